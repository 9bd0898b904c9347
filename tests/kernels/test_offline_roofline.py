"""Compulsory bytes and FLOPs against figures worked out by hand."""

import dataclasses

import pytest

from umedtrain.kernels.offline.cases import LLAMA_8B, LLAMA_70B, LlamaShape
from umedtrain.kernels.offline.roofline import H100, Cost, chunked_weight_bytes, costs, layer_parameters

TINY = LlamaShape("tiny", hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocab=32, tokens=10)


def test_a_tiny_model_by_hand():
    cost = costs(TINY, sequences=3, context=5)
    assert cost["rms_norm"].bytes == 2 * (10 * 8 * 2) + 8 * 2 + 10 * 4
    assert cost["rope"].bytes == 2 * (10 * 6 * 2 * 2) + 10 * 4
    assert cost["swiglu"].bytes == 3 * 10 * 16 * 2
    assert cost["swiglu backward"].bytes == 5 * 10 * 16 * 2
    assert cost["linear_logprobs"].flops == 2 * 10 * 8 * 32
    assert cost["linear_logprobs backward"].flops == 3 * 2 * 10 * 8 * 32
    assert cost["attention"].flops == 2 * 2 * 10 * 10 * 4 * 2 / 2  # two products of half a square
    assert cost["attention backward"].flops == 2.5 * cost["attention"].flops
    assert cost["paged_attention"].bytes == 2 * 3 * 5 * 2 * 2 * 2 + 2 * 3 * 4 * 2 * 2
    assert cost["sample"].bytes == 3 * 32 * 4
    assert layer_parameters(TINY) == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert cost["adamw"].bytes == 28 * layer_parameters(TINY)


@pytest.mark.parametrize(
    ("name", "microseconds", "bound"),
    [
        ("rms_norm", 40.1, "memory"),
        ("rms_norm backward", 61.4, "memory"),
        ("swiglu", 210.3, "memory"),
        ("cross_entropy backward", 1255, "memory"),
        ("linear_cross_entropy", 26100, "compute"),
        ("attention", 556, "compute"),
    ],
)
def test_llama_8b_on_h100(name, microseconds, bound):
    cost = costs(LLAMA_8B)[name]
    assert cost.seconds() * 1e6 == pytest.approx(microseconds, rel=0.002)
    assert cost.bound() == bound


def test_weight_traffic_falls_with_the_length_of_chunks():
    assert chunked_weight_bytes(LLAMA_8B, 256) / 1e9 == pytest.approx(201.7, rel=1e-3)
    assert chunked_weight_bytes(LLAMA_8B, 2048) / 1e9 < 26


def test_costs_are_positive_and_grow_with_the_model():
    small, large = costs(LLAMA_8B), costs(LLAMA_70B)
    assert small.keys() == large.keys()
    for name, cost in small.items():
        assert 0 < cost.bytes <= large[name].bytes, name
        assert cost.seconds() > 0


def test_times_are_of_the_gpu_that_is_given():
    half = dataclasses.replace(H100, bytes_per_second=H100.bytes_per_second / 2)
    assert Cost(1e9).seconds(half) == 2 * Cost(1e9).seconds(H100)
