"""The least that each operation must move and multiply, and the least time that takes on an H100.

    python -m umedtrain.kernels.offline.roofline [--shape 8b]

Bytes are compulsory traffic with device memory: every input read once, every output written once, nothing else. FLOPs
are those of matrix products; element-wise work is never the limit. Times are the larger of bytes / bandwidth and FLOPs
/ peak, both from the data sheet, which no kernel reaches. **Nothing here was measured.** Activations, weights and
gradients are bf16, statistics and optimizer states fp32.
"""

import argparse
from dataclasses import dataclass

from umedtrain.kernels.offline import cases
from umedtrain.kernels.offline.cases import LlamaShape

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet."""

    name: str
    bytes_per_second: float
    flops_per_second: float
    multiprocessors: int


H100 = Gpu("H100 SXM5 80 GB", 3.35e12, 989.4e12, 132)
"""NVIDIA H100 Tensor Core GPU data sheet: HBM3 bandwidth, dense bf16 tensor-core peak."""


@dataclass(frozen=True)
class Cost:
    """Compulsory bytes and matrix FLOPs of an operation."""

    bytes: float
    flops: float = 0.0
    note: str = ""

    def seconds(self, gpu: Gpu = H100) -> float:
        """The least time on `gpu` by its data sheet: not a measurement."""
        return max(self.bytes / gpu.bytes_per_second, self.flops / gpu.flops_per_second)

    def bound(self, gpu: Gpu = H100) -> str:
        """What limits it: "memory" or "compute"."""
        return "memory" if self.bytes / gpu.bytes_per_second >= self.flops / gpu.flops_per_second else "compute"


def costs(shape: LlamaShape, *, sequences: int = 64, context: int = 8192) -> dict[str, Cost]:
    """The cost of each operation on `shape.tokens` tokens; decoding is for `sequences` that have `context` tokens."""
    return (
        _elementwise(shape)
        | _losses(shape)
        | _attention(shape)
        | _decoding(shape, sequences, context)
        | _optimizer(shape)
    )


def layer_parameters(shape: LlamaShape) -> int:
    """Parameters of one transformer layer."""
    heads = 2 * shape.heads + 2 * shape.kv_heads
    return shape.hidden * (heads * shape.head_dim + 3 * shape.intermediate + 2)


def chunked_weight_bytes(shape: LlamaShape, chunk: int) -> int:
    """Traffic of the head's weight and its fp32 gradient in a chunked linear + loss, of `chunk` tokens each.

    Each chunk reads the weight for the logits and for the hidden gradient, and reads and writes its gradient.
    """
    chunks = -(-shape.tokens // chunk)
    return chunks * shape.hidden * shape.vocab * (2 * BF16 + 2 * FP32)


def _elementwise(shape: LlamaShape) -> dict[str, Cost]:
    t, row, wide = shape.tokens, shape.tokens * shape.hidden * BF16, shape.tokens * shape.intermediate * BF16
    heads = t * (shape.heads + shape.kv_heads) * shape.head_dim * BF16
    weight, partial = shape.hidden * BF16, 2 * H100.multiprocessors * shape.hidden * FP32
    return {
        "rms_norm": Cost(2 * row + weight + t * FP32, note="x -> y, rstd"),
        "rms_norm backward": Cost(3 * row + weight + t * FP32 + partial, note="dy, x -> dx, dw by partial sums"),
        "add_rms_norm": Cost(4 * row + weight + t * FP32, note="x, residual -> sum, y, rstd"),
        "add_rms_norm backward": Cost(4 * row + weight + t * FP32 + partial, note="dy, dsum, sum -> dx, dw"),
        "rope": Cost(2 * heads + t * FP32, note="q, k, positions -> q, k; backward the same"),
        "swiglu": Cost(3 * wide, note="gate, up -> product"),
        "swiglu backward": Cost(5 * wide, note="dproduct, gate, up -> dgate, dup"),
        "swiglu backward, recomputing": Cost(6 * wide, note="also writes the product, which then need not be kept"),
    }


def _losses(shape: LlamaShape) -> dict[str, Cost]:
    t, logits = shape.tokens, shape.tokens * shape.vocab * BF16
    hidden, weight = t * shape.hidden * BF16, shape.hidden * shape.vocab * BF16
    gemm, row = 2 * t * shape.hidden * shape.vocab, t * (8 + FP32)
    return {
        "cross_entropy": Cost(logits + row, note="logits -> loss"),
        "cross_entropy backward": Cost(2 * logits + row, note="logits, lse -> dlogits"),
        "linear_logprobs": Cost(hidden + weight + row, gemm, "logits never stored"),
        "linear_logprobs backward": Cost(2 * hidden + 2 * weight + weight // BF16 * FP32, 3 * gemm, "logits once more"),
        "linear_cross_entropy": Cost(2 * hidden + 2 * weight + weight // BF16 * FP32, 3 * gemm, "with its gradients"),
    }


def _attention(shape: LlamaShape) -> dict[str, Cost]:
    t, width = shape.tokens, shape.head_dim * BF16
    q, k, lse = t * shape.heads * width, t * shape.kv_heads * width, t * shape.heads * FP32
    causal = 4 * t * t * shape.heads * shape.head_dim / 2
    return {
        "attention": Cost(2 * q + 2 * k + lse, causal, "one causal segment: QK, PV, half the square"),
        "attention backward": Cost(4 * q + 4 * k + 2 * lse, 2.5 * causal, "5 products"),
        "attention backward, deterministic": Cost(6 * q + 6 * k + 3 * lse, 3.5 * causal, "two passes: 7 products"),
    }


def _decoding(shape: LlamaShape, sequences: int, context: int) -> dict[str, Cost]:
    kv = 2 * sequences * context * shape.kv_heads * shape.head_dim * BF16
    q = 2 * sequences * shape.heads * shape.head_dim * BF16
    flops = 4 * sequences * context * shape.heads * shape.head_dim
    weights = shape.hidden * shape.intermediate
    activations = sequences * (shape.hidden + shape.intermediate) * BF16
    product = 2 * sequences * weights
    return {
        "paged_attention": Cost(kv + q, flops, f"{sequences} sequences of {context} tokens, one layer"),
        "sample": Cost(sequences * shape.vocab * FP32, note=f"{sequences} rows of fp32 logits, read once"),
        "linear bf16": Cost(weights * BF16 + activations, product, f"up projection of {sequences} tokens"),
        "linear int8": Cost(weights + shape.intermediate * BF16 + activations, product, "a scale for each output"),
        "linear int4": Cost(weights / 2 + weights / 128 * BF16 + activations, product, "a scale for each 128 weights"),
    }


def _optimizer(shape: LlamaShape) -> dict[str, Cost]:
    parameters = layer_parameters(shape)
    return {
        "adamw": Cost(parameters * (BF16 + 6 * FP32 + BF16), note="one layer; bf16 gradient and copy, fp32 p, m, v"),
        "adamw 8-bit": Cost(parameters * (BF16 + 2 * FP32 + 4 + BF16), note="one layer; fp32 p, 8-bit m, v"),
        "grad_norm": Cost(parameters * BF16, note="one layer, bf16 gradients, read once"),
    }


def _main() -> None:
    shapes = {shape.name: shape for shape in (cases.LLAMA_8B, cases.LLAMA_70B)}
    parser = argparse.ArgumentParser(prog="python -m umedtrain.kernels.offline.roofline")
    parser.add_argument("--shape", choices=shapes, default="8b")
    shape = shapes[parser.parse_args().shape]
    print(f"Llama-3 {shape.name}, {shape.tokens} tokens. {H100.name} by its data sheet; nothing was measured.\n")
    for name, cost in costs(shape).items():
        figures = f"{cost.bytes / 1e9:9.4f} GB {cost.flops / 1e12:8.3f} TFLOP {cost.seconds() * 1e6:10.1f} us"
        print(f"{name:34s} {figures} {cost.bound():8s} {cost.note}")


if __name__ == "__main__":
    _main()
