"""The kernels in a Hugging Face Llama: `patch_llama(model)`, and `unpatch_llama(model)` to be rid of them again.

Every module gets its own `forward`; classes, modules of the library and other models stay as they are, and weights,
names and checkpoints do not change. What is replaced, wherever in `model` it is found:

    LlamaRMSNorm       rms_norm(casting="hf"): the same casts in the same order
    LlamaMLP           down_proj(swiglu(gate_proj(x), up_proj(x), casting="hf")): likewise
    LlamaAttention     its own forward, in which `apply_rotary_pos_emb` is `rope`: fp32 arithmetic and one rounding,
                       where the library rounds three times
    LlamaForCausalLM   in training, with labels: linear_cross_entropy through `lm_head`, without logits

The loss is the library's: labels shifted by one (or `shift_labels` as they are), mean over the labels that are not
`ignore_index`, or their sum divided by `num_items_in_batch`, which a trainer gives that accumulates gradients. Under
autocast the head multiplies in autocast's dtype, as it does otherwise. `output.logits` is then None, since not making
them is the point; `patch_llama(model, logits_with_labels=True)` makes them beside the loss. The library's own path is
taken, logits and all, in evaluation mode, without labels, with `logits_to_keep`, with a `loss_function` that is not the
library's, and when `lm_head` is no longer the linear layer that was patched (wrapped by an adapter, say).

The head's weight is read inside `lm_head`'s forward, so FSDP and other hooks have gathered it by then; a head that is
split by tensor parallelism is not supported. Patch before wrapping the model in anything that replaces `forward`.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from umedtrain.kernels.linear_loss import IGNORED, linear_cross_entropy
from umedtrain.kernels.norm import rms_norm
from umedtrain.kernels.rope import rope
from umedtrain.kernels.swiglu import swiglu

_RECORD = "_umedtrain_patched"
"""Attribute of a patched model: the modules whose forward was replaced, each with the one it had of its own or None."""


def patch_llama(model: nn.Module, *, logits_with_labels: bool = False) -> nn.Module:
    """Let the Llama modules of `model` run on the kernels of this package; see the header of the file.

    Args:
        model: a built transformers LlamaForCausalLM, LlamaModel, or anything that contains them.
        logits_with_labels: whether a training call with labels returns logits too, made by `lm_head` beside the loss.

    Returns:
        `model` itself.

    Raises:
        ValueError: if there is no Llama in it, if any of it is patched already, and for what the kernels do not do: an
            activation other than SiLU, or a release of transformers with another attention. Nothing is changed then.
        ImportError: without transformers.
    """
    from transformers.models.llama import modeling_llama as llama

    modules = list(model.modules())
    if any(_RECORD in module.__dict__ or _is_ours(module.__dict__.get("forward")) for module in modules):
        raise ValueError("model is patched already, or a part of it is; call unpatch_llama first")
    replacements: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module in modules:
        if isinstance(module, llama.LlamaRMSNorm):
            replacements.append((module, _norm_forward))
        elif isinstance(module, llama.LlamaMLP):
            if module.config.hidden_act not in ("silu", "swish"):
                raise ValueError(f"model's hidden_act is {module.config.hidden_act!r}; it must be 'silu'")
            replacements.append((module, _mlp_forward))
        elif isinstance(module, llama.LlamaAttention):
            replacements.append((module, _attention_forward(type(module).forward)))
        elif isinstance(module, llama.LlamaForCausalLM) and _is_plain_head(module.lm_head):
            replacements.append((module.lm_head, _head_forward))
            replacements.append((module, _causal_forward(module, logits_with_labels)))
    if not replacements:
        raise ValueError(f"model is a {type(model).__name__} and contains no module of a transformers Llama")
    setattr(model, _RECORD, [(module, module.__dict__.get("forward")) for module, _ in replacements])
    for module, forward in replacements:
        module.forward = MethodType(forward, module)
    return model


def unpatch_llama(model: nn.Module) -> nn.Module:
    """Undo `patch_llama(model)` completely: every forward as before, no attribute left behind.

    Raises:
        ValueError: if `patch_llama` was not called with this very model.
    """
    if _RECORD not in model.__dict__:
        raise ValueError("model is not patched; it must be the module that patch_llama was called with")
    for module, forward in model.__dict__[_RECORD]:
        if forward is None:
            del module.forward
        else:
            module.forward = forward
    delattr(model, _RECORD)
    return model


def _ours(forward: Callable[..., Any]) -> Callable[..., Any]:
    forward._umedtrain = True
    return forward


def _is_ours(forward: Any) -> bool:
    return hasattr(forward, "_umedtrain")


@_ours
def _norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, casting="hf")


@_ours
def _mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), casting="hf"))


def _attention_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The library's own function with another `apply_rotary_pos_emb` among its globals.

    It has changed in most releases while this call in it has not, and other models go on using the original.
    """
    forward = inspect.unwrap(forward)
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        raise ValueError("the attention of this release of transformers does not call apply_rotary_pos_emb")
    names = {**forward.__globals__, "apply_rotary_pos_emb": _rotate}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return _ours(functools.wraps(forward)(changed))


def _rotate(
    q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary_pos_emb`; the tables have each frequency twice, and one row of the batch may serve for all."""
    batch, _, tokens, head_dim = q_BHTK.shape
    half = (batch, tokens, head_dim // 2)
    cos_TF, sin_TF = (x[..., : head_dim // 2].expand(half).flatten(0, 1) for x in (cos_BTK, sin_BTK))
    q_THK, k_TGK = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BGTK))
    q_THK, k_TGK = rope(q_THK, k_TGK, cos_TF, sin_TF)
    q_BTHK, k_BTGK = (x.unflatten(0, (batch, tokens)) for x in (q_THK, k_TGK))
    return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2)


@_ours
def _head_forward(self: nn.Linear, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Logits; or, with targets, the sum of the cross-entropies of those that are not -100."""
    if targets_BT is None:
        return nn.functional.linear(hidden_BTD, self.weight)
    device, weight_VD = hidden_BTD.device.type, self.weight
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_BTD, weight_VD = hidden_BTD.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        return linear_cross_entropy(hidden_BTD.flatten(0, -2), weight_VD, targets_BT.flatten())


def _is_plain_head(head: nn.Module) -> bool:
    return isinstance(head, nn.Linear) and head.bias is None and head.weight.is_floating_point()


def _causal_forward(model: nn.Module, logits_with_labels: bool) -> Callable[..., Any]:
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple

    original = model.__dict__.get("forward")
    by_library = type(model).forward if original is None else original.__func__

    @functools.wraps(by_library)
    def forward(
        self: nn.Module,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        with_loss = self.training and labels is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
        if not with_loss or self.loss_function is not ForCausalLMLoss or not _is_ours(self.lm_head.forward):
            return by_library(self, **inputs, labels=labels, logits_to_keep=logits_to_keep)
        outputs = self.model(**inputs)
        hidden_BTD = outputs.last_hidden_state
        return CausalLMOutputWithPast(
            loss=_loss(self.lm_head, hidden_BTD, labels, **kwargs),
            logits=self.lm_head(hidden_BTD) if logits_with_labels else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    return _ours(functools.wraps(by_library)(can_return_tuple(forward)))


def _loss(
    head: nn.Module,
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss. The shift moves labels, not hidden states, which stay where they are."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels_BT, (0, 1), value=ignore_index)[..., 1:]
    targets_BT = shift_labels.to(hidden_BTD.device)
    ignored_BT = targets_BT == ignore_index
    total = head(hidden_BTD, targets_BT.masked_fill(ignored_BT, IGNORED))
    if num_items_in_batch is None:
        return total / (~ignored_BT).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
