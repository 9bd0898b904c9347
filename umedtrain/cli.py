"""The console command `umedtrain`: what is not a training launch."""

import math
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from umedtrain import Sampler, SamplingParams


def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    rope_factor: float | None = None,
) -> None:
    """Convert a checkpoint to a Hugging Face directory, tokenizer included.

    Args:
        source: Hugging Face directory, Meta directory (params.json and consolidated.*.pth) or GGUF file.
        target: Directory to write.
        dtype: Dtype of the written weights.
        rope_factor: RoPE scaling factor of a Meta directory, which its params.json leaves out: 32 for Llama 3.2.
    """
    import torch

    from umedtrain import weights

    weights.convert(source, target, dtype=getattr(torch, dtype), rope_factor=rope_factor)
    print(f"wrote {target}")


def chat(
    model: tyro.conf.Positional[Path],
    *,
    system: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    remember: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
) -> None:
    """Talk to a model in the terminal. `/new` starts over; `/quit`, an empty line or end of input leaves; Ctrl-C ends
    an answer, of which the dialog keeps what has been shown.

    Args:
        model: Checkpoint directory.
        system: System message.
        temperature: 0 takes the most likely token every time.
        top_p: Draw from the smallest set of tokens with this much probability.
        max_tokens: Longest answer, in tokens.
        seed: Seed of sampling.
        remember: Show the model the whole dialog. False for models trained on single questions.
        dtype: Dtype of weights and cache.
        device: Where to compute; the first GPU if there is one, else the CPU.
    """
    from umedtrain import SamplingParams

    sampler = _load_sampler(model, dtype, device)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    dialog = list(opening)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if question in ("", "/quit"):
            return
        if question == "/new" or not remember:
            dialog = list(opening)
        if question == "/new":
            continue
        asked = {"role": "user", "content": question}
        try:
            answer = _answer(sampler, [*dialog, asked], params)
        except ValueError as error:  # above all a dialog that has grown too long
            print(f"error: {error}; /new starts over", file=sys.stderr)
            continue
        dialog += [asked, {"role": "assistant", "content": answer}]


def _answer(sampler: "Sampler", dialog: list[dict[str, str]], params: "SamplingParams") -> str:
    """Print an answer as it grows, without the white space around it, and return it; Ctrl-C cuts it short."""
    from umedtrain.sampling.requests import check_request
    from umedtrain.sampling.stops import GrowingText

    engine = sampler.engine
    request = check_request(dialog, params, sampler.tokenizer, sampler.model.config, name="the dialog")
    interrupted: list[int] = []
    # Seen between two tokens only: the engine is never left in the middle of one.
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    text, answer, told = GrowingText(sampler.tokenizer), "", 0
    (sequence,) = engine.submit(request)
    try:
        while not (sequence.finished or interrupted):
            engine.step(1)
            shown = sequence.answer[:-1] if isinstance(sequence.stop_reason, int) else sequence.answer
            for token in shown[told:]:
                text.push(token)
            told = len(shown)
            if sequence.finished:
                text.flush()
            grown = text.text.strip()
            print(grown[len(answer) :], end="", flush=True)
            answer = grown
    finally:
        engine.cancel([sequence])
        signal.signal(signal.SIGINT, before)
        print()
    return answer


def serve(
    model: tyro.conf.Positional[Path],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    max_running: int = 256,
    cache_gib: float = 2.0,
    max_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
    max_n: int = 128,
    max_queue: int = 1024,
    max_body_bytes: int = 4 * 2**20,
    client_seconds: float = 60.0,
    drain_seconds: float = 30.0,
) -> None:
    """Serve a model over HTTP with OpenAI's protocol: /v1/chat/completions, /v1/completions, /v1/models.

    Args:
        model: Checkpoint directory.
        name: Name of the model for clients; the directory's if left out.
        host: Address to listen at. Only this machine can reach the default, and only by its own names without a key.
        port: Port to listen at; 0 takes a free one.
        api_key: What clients must send as their key; better given as the environment variable UMEDTRAIN_API_KEY, which
            other users of the machine cannot see.
        dtype: Dtype of weights and cache.
        device: Where to compute; the first GPU if there is one, else the CPU.
        quantize: Compute with copies of the projections in so many bits.
        max_running: Samples that are computed at once, at most.
        cache_gib: Memory of keys and values, in GiB.
        max_prompt_tokens: Longest prompt, in tokens, if shorter than the model's positions allow.
        max_tokens: Longest answer, in tokens, likewise.
        max_n: Most samples of one prompt.
        max_queue: Most samples that wait or run at once, of all clients; more are refused with 429.
        max_body_bytes: Largest request.
        client_seconds: Time that a client has to send the head of a request, its body, and to take each piece of its
            answer.
        drain_seconds: Time that answers under way have to finish after SIGTERM.
    """
    try:
        from umedtrain.sampling.server.protocol import Limits
        from umedtrain.sampling.server.run import Server
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs {error.name}: pip install 'umedtrain[serve]'") from None

    if not 0 <= port < 2**16:
        raise ValueError(f"port must lie in 0..65535, got {port}")
    limits = Limits(max_prompt_tokens, max_tokens, max_n, max_queue, max_body_bytes, client_seconds)
    if not 0 < cache_gib < math.inf:
        raise ValueError(f"cache_gib must be a positive number, got {cache_gib}")
    if max_running < 1:
        raise ValueError(f"max_running must be at least 1, got {max_running}")
    cache_bytes = int(cache_gib * 2**30)
    sampler = _load_sampler(model, dtype, device, max_rows=max_running, cache_bytes=cache_bytes, quantize=quantize)
    Server(
        sampler,
        name=name or model.resolve().name,
        host=host,
        port=port,
        limits=limits,
        api_key=api_key or os.environ.get("UMEDTRAIN_API_KEY") or None,
        drain_seconds=drain_seconds,
    ).run()


def _load_sampler(path: Path, dtype: str, device: str | None, **options: Any) -> "Sampler":
    import torch

    from umedtrain import Sampler, load_model, load_tokenizer

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch's words for a device that it does not know or have
        raise ValueError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from None
    tokenizer, model = load_tokenizer(path), load_model(path, dtype=getattr(torch, dtype), device=device)
    if tokenizer.vocab_size > (rows := model.config.vocab_size):
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {rows} embeddings: "
            "they do not belong together"
        )
    return Sampler(model, tokenizer, **options)


def main() -> None:
    """Entry point of the console command; users' mistakes end in one sentence and exit code 1."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"convert": convert, "chat": chat, "serve": serve},
            description="Post-training for Llama-3.",
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
