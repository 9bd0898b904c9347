"""What tests of attention share: an explicit mask, dense attention under it, and small blocks for the interpreter."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from umedtrain.kernels import attention_backward, attention_forward
from umedtrain.kernels.attention import attention, attention_plan
from umedtrain.kernels.attention_blocks import Config

# A prompt over two blocks with three answers, one of which goes on; a segment of one token; a lonely document. Around
# 16 and 32, the rows of the blocks that `small_blocks` sets.
TREE = ((33, None), (16, 0), (1, 0), (17, 0), (9, 3), (31, None), (1, None))


def visible(lengths, parents):
    """bool [T, T]: whether query i sees key j, from the words of the definition."""
    segment_of = [segment for segment, length in enumerate(lengths) for _ in range(length)]
    ancestors = []
    for parent in parents:
        ancestors.append(set() if parent is None else ancestors[parent] | {parent})
    tokens = range(len(segment_of))

    def sees(i, j):
        return segment_of[j] in ancestors[segment_of[i]] or (segment_of[i] == segment_of[j] and j <= i)

    mask_TT = torch.tensor([[sees(i, j) for j in tokens] for i in tokens], dtype=torch.bool)
    return mask_TT.reshape(len(tokens), len(tokens))


def dense(q_THK, k_TGK, v_TGK, mask_TT, scale=None):
    """Attention in the inputs' own dtype, all T x T scores formed."""
    scale = q_THK.shape[-1] ** -0.5 if scale is None else scale
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    k_THK, v_THK = (x.repeat_interleave(repeat, 1) for x in (k_TGK, v_TGK))
    scores_HTT = torch.einsum("ihk,jhk->hij", q_THK, k_THK) * scale
    weights_HTT = scores_HTT.masked_fill(~mask_TT, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhk->ihk", weights_HTT, v_THK)


def random_inputs(tokens, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32):
    """q, k, v and an incoming gradient with a weight of its own for every row."""
    q, k, v, do = (torch.randn(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads))
    do *= torch.rand(tokens, 1, 1) * 2
    return tuple(x.to(dtype) for x in (q, k, v, do))


def run(function, q, k, v, do):
    """function(q, k, v) and the gradients of q, k, v under the incoming gradient `do`."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, do)


def run_packed(segments, inputs, impl, scale=None):
    """out, dq, dk, dv over `segments`, pairs of length and parent."""
    plan = attention_plan(*zip(*segments, strict=True)) if segments else attention_plan([])
    return run(lambda q, k, v: attention(q, k, v, plan, scale=scale, impl=impl), *inputs)


@contextmanager
def small_blocks(query_rows=32, key_rows=16, edge_rows=16, descriptors=True):
    """Blocks of which a few fit into a short segment, for all three kernels and every type."""
    config = Config(query_rows, key_rows, edge_rows, 4, 2, 1, descriptors)
    table = {"default": ((256, config),), "fp32": ((256, config),)}
    tables = ((attention_forward, "FORWARD"), (attention_backward, "DQ"), (attention_backward, "DKDV"))
    with ExitStack() as stack:
        for module, name in tables:
            stack.enter_context(mock.patch.object(module, name, table))
        yield
