"""The sampler's key-value cache: every prompt once, shared by its samples, and each sample's own tokens.

Samples stand in a grid of P prompts by N samples. Queries of all samples of a prompt, and of all the query
heads that share a key-value head, are rows of one matrix product with that prompt's keys, so these are read
once per step.

Shape suffixes: P prompts, N samples of a prompt, R live rows (samples in the grid, row by row), C prompt
tokens, S own tokens, H query heads, G key-value heads, M = H / G, K head dimension, T tokens of a prefill.
"""

from collections.abc import Sequence

import torch

from umedtrain.model.attention import attention
from umedtrain.model.layout import Layout


class SharedPromptCache:
    """A `umedtrain.model.cache.KVCache` for a batch of prompts with up to N samples each.

    Use: `prefill(first)` and a forward pass for each run of prompts; then, for every new token of all live
    rows, a forward pass and `advance()`. All samples are equally long at any time, so only prompts need
    masks.

    Args:
        lengths: tokens of each prompt.
        prompt_R: int64, the prompt of every row, in ascending order.
        sample_R: int64, the row's place among the samples of its prompt.
        capacity: own tokens that a sample may store.
    """

    def __init__(
        self, lengths: Sequence[int], prompt_R: torch.Tensor, sample_R: torch.Tensor, *, capacity: int
    ) -> None:
        device = prompt_R.device
        self.capacity, self.used = capacity, 0
        self.lengths_P = torch.tensor(lengths, device=device)
        self.samples = int(sample_R.max()) + 1
        self.longest = max(lengths)
        self._bias: torch.Tensor | None = None
        self.prompt_keys: list[torch.Tensor] = []  # per layer [P, G, C, K]
        self.prompt_values: list[torch.Tensor] = []
        self.own_keys: list[torch.Tensor] = []  # per layer [P, G, N, capacity, K]
        self.own_values: list[torch.Tensor] = []
        self._prefill_first: int | None = None
        self._place(prompt_R, sample_R)

    def _place(self, prompt_R: torch.Tensor, sample_R: torch.Tensor) -> None:
        self.prompt_R = prompt_R
        self.cell_R = prompt_R * self.samples + sample_R
        self.dense = len(self.cell_R) == len(self.lengths_P) * self.samples

    def prefill(self, first: int | None) -> None:
        """The next forward pass holds whole prompts from number `first` on; None: each row's next token."""
        self._prefill_first = first

    def advance(self) -> None:
        """Count the token that every layer has stored."""
        self.used += 1

    def positions(self, layout: Layout) -> torch.Tensor:
        """RoPE position of each new token."""
        if self._prefill_first is not None:
            return layout.positions_T
        return self.lengths_P[self.prompt_R] + self.used

    def attend(
        self, layer: int, q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Store the new keys and values of `layer`; return the attention output [T, H, K]."""
        if self._prefill_first is not None:
            return self._prefill(layer, q_THK, k_TGK, v_TGK, layout)
        return self._decode(layer, q_THK, k_TGK, v_TGK)

    def _prefill(
        self, layer: int, q_THK: torch.Tensor, k_TGK: torch.Tensor, v_TGK: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        if layer == len(self.prompt_keys):
            num_prompts, (_, heads, head_dim) = len(self.lengths_P), k_TGK.shape
            prompt_shape = (num_prompts, heads, self.longest, head_dim)
            own_shape = (num_prompts, heads, self.samples, self.capacity, head_dim)
            # Zeros, since keys past a prompt's end are masked by weight zero, and 0 * NaN is NaN.
            self.prompt_keys.append(k_TGK.new_zeros(prompt_shape))
            self.prompt_values.append(k_TGK.new_zeros(prompt_shape))
            self.own_keys.append(k_TGK.new_empty(own_shape))
            self.own_values.append(k_TGK.new_empty(own_shape))
        prompt_T = layout.segment_of_T + self._prefill_first
        self.prompt_keys[layer][prompt_T, :, layout.positions_T] = k_TGK
        self.prompt_values[layer][prompt_T, :, layout.positions_T] = v_TGK
        return attention(q_THK, k_TGK, v_TGK, layout)

    def _decode(self, layer: int, q_RHK: torch.Tensor, k_RGK: torch.Tensor, v_RGK: torch.Tensor) -> torch.Tensor:
        """One softmax over two blocks of scores: the prompt's keys, shared, and each sample's own."""
        num_prompts, heads, samples, _, head_dim = self.own_keys[layer].shape
        length = self.used + 1
        self.own_keys[layer][:, :, :, self.used] = self._to_grid(k_RGK).transpose(1, 2)
        self.own_values[layer][:, :, :, self.used] = self._to_grid(v_RGK).transpose(1, 2)
        prompt_keys, prompt_values = (
            self.prompt_keys[layer].flatten(0, 1),
            self.prompt_values[layer].flatten(0, 1),
        )
        own_keys = self.own_keys[layer].flatten(0, 2)[:, :length]
        own_values = self.own_values[layer].flatten(0, 2)[:, :length]

        q_PNGMK = self._to_grid(q_RHK * head_dim**-0.5).unflatten(2, (heads, -1))
        group = q_PNGMK.shape[3]
        q = q_PNGMK.transpose(1, 2).contiguous().view(num_prompts * heads, samples * group, head_dim)
        prompt_scores = torch.baddbmm(self._mask_bias(heads, q.dtype), q, prompt_keys.transpose(1, 2))
        own_scores = torch.bmm(q.view(-1, group, head_dim), own_keys.transpose(1, 2))
        scores = torch.cat((prompt_scores, own_scores.view(*prompt_scores.shape[:2], length)), dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        prompt_part = torch.bmm(weights[..., :-length], prompt_values)
        out = torch.baddbmm(
            prompt_part.view(-1, group, head_dim),
            weights.view(-1, group, weights.shape[-1])[..., -length:],
            own_values,
        )
        out_PNGMK = out.view(num_prompts, heads, samples, group, head_dim).transpose(1, 2)
        out_cells = out_PNGMK.reshape(num_prompts * samples, heads * group, head_dim)
        return out_cells if self.dense else out_cells[self.cell_R]

    def _mask_bias(self, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """[P * G, 1, C]: minus infinity past each prompt's end; made once for all layers and steps."""
        if self._bias is None:
            beyond_PC = torch.arange(self.longest, device=self.lengths_P.device) >= self.lengths_P[:, None]
            bias_PC = torch.zeros_like(beyond_PC, dtype=dtype).masked_fill_(beyond_PC, -torch.inf)
            self._bias = bias_PC.repeat_interleave(heads, dim=0)[:, None]
        return self._bias

    def _to_grid(self, x_RHK: torch.Tensor) -> torch.Tensor:
        """[P, N, H, K]; cells without a row are zero."""
        num_prompts = len(self.lengths_P)
        if not self.dense:
            cells = x_RHK.new_zeros(num_prompts * self.samples, *x_RHK.shape[1:])
            x_RHK = cells.index_copy_(0, self.cell_R, x_RHK)
        return x_RHK.unflatten(0, (num_prompts, self.samples))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only (int64 indices, ascending); shrinks the grid when it has thinned out."""
        prompt_R, cell_R = self.prompt_R[rows], self.cell_R[rows]
        prompts, new_prompt_R, counts = prompt_R.unique_consecutive(return_inverse=True, return_counts=True)
        samples = int(counts.max())
        if 4 * len(prompts) * samples > 3 * len(self.lengths_P) * self.samples:
            self._place(prompt_R, cell_R - prompt_R * self.samples)
            return
        first_R = (counts.cumsum(0) - counts)[new_prompt_R]
        new_sample_R = torch.arange(len(rows), device=rows.device) - first_R
        # Cells that get no row are filled with those of cell 0: finite, and never read.
        source = torch.zeros(len(prompts), samples, dtype=torch.int64, device=rows.device)
        source[new_prompt_R, new_sample_R] = cell_R
        for layer in range(len(self.own_keys)):
            self.prompt_keys[layer] = self.prompt_keys[layer][prompts]
            self.prompt_values[layer] = self.prompt_values[layer][prompts]
            self.own_keys[layer] = self._gather(self.own_keys[layer], source)
            self.own_values[layer] = self._gather(self.own_values[layer], source)
        self.lengths_P, self._bias = self.lengths_P[prompts], None
        self.samples = samples
        self._place(new_prompt_R, new_sample_R)

    def _gather(self, own_PGNSK: torch.Tensor, source_PN: torch.Tensor) -> torch.Tensor:
        """The cells `source_PN` as a new grid; only the used tokens are copied."""
        _, heads, samples, capacity, head_dim = own_PGNSK.shape
        new = own_PGNSK.new_empty(source_PN.shape[0], heads, source_PN.shape[1], capacity, head_dim)
        head_G = torch.arange(heads, device=source_PN.device)[:, None]
        prompt_PGN, sample_PGN = source_PN[:, None] // samples, source_PN[:, None] % samples
        cells = ((prompt_PGN * heads + head_G) * samples + sample_PGN).flatten()
        new.flatten(0, 2)[:, : self.used] = own_PGNSK.flatten(0, 2)[:, : self.used][cells]
        return new
