"""The reward model: a Llama whose last token of each answer is read by a linear head.

Shape suffixes: T tokens, D hidden size, N childless segments.
"""

import torch
from torch import nn

from umedtrain.model.config import LlamaConfig
from umedtrain.model.layout import Layout
from umedtrain.model.llama import Llama, initial_weight


class RewardHead(nn.Linear):
    """D -> 1 without bias; kept and computed in fp32, for bf16 rewards of good answers tie."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 1, bias=False)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return hidden_ND.float() @ self.weight[0].float()


class RewardModel(nn.Module):
    """One fp32 reward per childless segment of the layout, read at the segment's last token.

    The place is taken from the layout, never from a padding id. Exported as `LlamaForSequenceClassification`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Llama(config)
        # A reward model never makes logits, so it has no output projection to hold, shard or train.
        self.model.lm_head = None
        self.score = RewardHead(config.hidden_size)

    def forward(self, tokens_T: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Rewards, fp32 [N], of the layout's childless segments in stream order."""
        hidden_TD = self.model(tokens_T, layout)
        last_rows_N = torch.tensor([layout.last_rows[leaf] for leaf in layout.leaves], device=hidden_TD.device)
        return self.score(hidden_TD[last_rows_N])

    @torch.no_grad()
    def init_weights(self, *, seed: int) -> None:
        """Fill every parameter, of backbone and head, with `initial_weight`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, self.config, seed=seed))
