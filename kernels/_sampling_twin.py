"""The PyTorch twin of `umedtrain.kernels.sampling`: the same integers, so the same tokens.

Functions are called as in that file, where they are described. Only the search for a threshold differs: here keys are
counted into 2^15 bins by their upper half, then by their lower half.

Shape suffixes: R rows, V vocabulary, N bins of keys.
"""

import torch


def _keys(below_RV: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """Bits of the weights, int32 [R, V], from logits minus their maximum, which are overwritten.

    Operation by operation what `_weights_kernel` does.
    """
    # Not number / tensor, which PyTorch rounds twice.
    scale_R = (torch.full_like(temperature_R, 1.4426950408889634) / temperature_R).clamp(max=3.0e38)
    x_RV = below_RV.mul_(scale_R[:, None])
    too_small_RV = (x_RV >= -43.0).logical_not_()
    x_RV.masked_fill_(too_small_RV, 0.0)
    whole_RV = x_RV.add(0.5).floor_()
    f_RV = x_RV.sub_(whole_RV)
    p_RV = f_RV.mul(0.00015353361959569156)
    for coefficient in (
        0.0013398873852565885, 0.00961843691766262, 0.055503323674201965, 0.24022647738456726, 0.6931471824645996,
    ):  # fmt: skip
        p_RV.add_(coefficient).mul_(f_RV)
    exponent_RV = whole_RV.to(torch.int32).bitwise_left_shift_(23)
    return exponent_RV.add_(p_RV.add_(1.0).view(torch.int32)).masked_fill_(too_small_RV, 0)


def _fixed_point(key: torch.Tensor) -> torch.Tensor:
    """floor(2^43 w), int64."""
    mantissa = key.bitwise_and(0x7FFFFF).bitwise_or_(0x800000).to(torch.int64).bitwise_left_shift_(20)
    return mantissa.bitwise_right_shift_(key.bitwise_right_shift(23).neg_().add_(127).clamp_(max=63).to(torch.int64))


def _derived_key(key_R: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """Integers wrap."""
    z = key_R + (index_R + 1) * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def _share(total_R: torch.Tensor, fraction_R: torch.Tensor) -> torch.Tensor:
    """floor(total * fraction / 2^62)."""
    total_high, total_low = total_R >> 31, total_R & 0x7FFFFFFF
    high, low = fraction_R >> 31, fraction_R & 0x7FFFFFFF
    return total_high * high + ((total_high * low + total_low * high + ((total_low * low) >> 31)) >> 31)


def _threshold(key_RV: torch.Tensor, measure_RV: torch.Tensor, limit_R: torch.Tensor) -> torch.Tensor:
    """The smallest key, int32 [R], with less than the limit above it."""
    measures = key_RV.new_zeros((2, len(key_RV), 1 << 15), dtype=torch.int64)
    high_RV = (key_RV >> 15).to(torch.int64)
    high_R, above_R = _bin(measures[0].scatter_add_(1, high_RV, measure_RV), limit_R)
    measure_RV = measure_RV.masked_fill(high_RV != high_R[:, None], 0)
    low_RV = (key_RV & 0x7FFF).to(torch.int64)
    low_R, _ = _bin(measures[1].scatter_add_(1, low_RV, measure_RV), limit_R - above_R)
    return (high_R << 15 | low_R).to(torch.int32)


def _bin(measure_RN: torch.Tensor, limit_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest bin with less than the limit above it, and what is above it."""
    above_RN = measure_RN.flip(-1).cumsum(-1).flip(-1) - measure_RN
    bin_R = (above_RN >= limit_R[:, None]).sum(-1)
    return bin_R, above_RN.gather(1, bin_R[:, None])[:, 0]


def _above(key_RV: torch.Tensor, key_R: torch.Tensor, before_R: torch.Tensor) -> torch.Tensor:
    """Whether a token comes, in the order of falling weight and rising id, before id `before` at weight `key`."""
    ids_V = torch.arange(key_RV.shape[1], device=key_RV.device)
    ties_RV = (key_RV == key_R[:, None]).logical_and_(ids_V < before_R[:, None])
    return ties_RV.logical_or_(key_RV > key_R[:, None])


def _prefix(
    key_RV: torch.Tensor, weight_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is kept, as a key and the id before which a token of that key is kept; and the key above which to draw."""
    top_k_R = torch.where(top_k_R > 0, top_k_R, key_RV.shape[1]).clamp(max=key_RV.shape[1])
    key_R = _threshold(key_RV, torch.ones_like(weight_RV), top_k_R)
    above_RV = key_RV > key_R[:, None]
    ties_R = top_k_R - above_RV.sum(-1)
    total_R = weight_RV.masked_fill(~above_RV, 0).sum(-1) + ties_R * _fixed_point(key_R)
    draw_key_R = key_R - 1

    top_p_R = torch.where(top_p_R < 1, top_p_R, 1.0).clamp(min=0.0)
    fraction_R = (top_p_R.double() * 2.0**31).to(torch.int64) << 31
    limit_R = _share(total_R, fraction_R).clamp(min=1)
    key_R = _threshold(key_RV, weight_RV, limit_R)
    above_R = weight_RV.masked_fill(key_RV <= key_R[:, None], 0).sum(-1)
    last_R = _fixed_point(key_R).clamp(min=1)
    ties_R = torch.div(limit_R - above_R + last_R - 1, last_R, rounding_mode="floor")
    is_tie_RV = key_RV == key_R[:, None]
    before_R = 1 + torch.searchsorted(is_tie_RV.cumsum(-1), ties_R[:, None])[:, 0]

    floor_R = torch.where(min_p_R > 0, min_p_R, 0.0).clamp(max=1.0).view(torch.int32) - 1
    before_R = before_R.masked_fill(floor_R >= key_R, 0)
    return torch.maximum(floor_R, key_R), before_R, torch.maximum(floor_R, draw_key_R)


def _draw(
    key_RV: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the mass of what was kept."""
    weight_RV, vocab = _fixed_point(key_RV), key_RV.shape[1]
    kept_RV = weight_RV
    key_R, before_R = torch.full_like(key_RV[:, 0], -1), torch.zeros_like(seeds_R)
    cut = (((top_k_R > 0) & (top_k_R < vocab)) | (top_p_R < 1) | (min_p_R > 0)).nonzero()[:, 0]
    if len(cut):
        cut_keys, cut_weights = key_RV[cut], weight_RV[cut]
        params = (top_k_R[cut], top_p_R[cut], min_p_R[cut])
        key_R[cut], before_R[cut], draw_key = _prefix(cut_keys, cut_weights, *params)
        weight_RV[cut] = cut_weights.masked_fill(cut_keys <= draw_key[:, None], 0)
        kept_RV = weight_RV.masked_fill(~_above(key_RV, key_R, before_R), 0)
    total_R = kept_RV.sum(-1)

    stream_R = _derived_key(seeds_R, positions_R.to(torch.int64))
    token_R, rows, attempt = torch.empty_like(seeds_R), torch.arange(len(key_RV), device=key_RV.device), 0
    while len(rows):
        mass_RV = weight_RV.cumsum(-1)
        uniform_R = (_derived_key(stream_R[rows], torch.full_like(rows, attempt)) >> 2) & ((1 << 62) - 1)
        target_R = _share(mass_RV[:, -1].contiguous(), uniform_R)
        candidate_R = torch.searchsorted(mass_RV, target_R[:, None], right=True)[:, 0].clamp_(max=vocab - 1)
        candidate_key_R = key_RV.gather(1, candidate_R[:, None])[:, 0]
        is_kept_R = (candidate_key_R == key_R) & (candidate_R < before_R)
        is_kept_R |= (candidate_key_R > key_R) | (mass_RV[:, -1] == 0)
        token_R[rows[is_kept_R]] = candidate_R[is_kept_R]
        left = (~is_kept_R).nonzero()[:, 0]
        rows, key_RV, key_R, before_R = rows[left], key_RV[left], key_R[left], before_R[left]
        is_before_RV = _above(key_RV, candidate_key_R[left], candidate_R[left])
        weight_RV, attempt = weight_RV[left].masked_fill_(~is_before_RV, 0), attempt + 1
    return token_R, total_R


def sample_slab(
    logits_RV: torch.Tensor, temperature_R: torch.Tensor, *truncation_and_key_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin, for a slab of rows."""
    logits_RV, vocab = logits_RV.float(), logits_RV.shape[1]
    peak_R1 = logits_RV.amax(-1, keepdim=True)
    ids_V = torch.arange(vocab, device=logits_RV.device)
    token_R = torch.where(logits_RV == peak_R1, ids_V, vocab - 1).amin(-1)
    below_RV = logits_RV - peak_R1
    log_sum_R = below_RV.exp().sum(-1).log()
    truncated_R = torch.zeros_like(log_sum_R)
    drawn = (temperature_R > 0).nonzero()[:, 0]
    if len(drawn):
        temperature_R = temperature_R[drawn]
        key_RV = _keys(below_RV[drawn], temperature_R)
        token_R[drawn], total_R = _draw(key_RV, *(x_R[drawn] for x_R in truncation_and_key_R))
        chosen_R = below_RV[drawn, token_R[drawn]]
        truncated_R[drawn] = chosen_R / temperature_R - (total_R.float() * 2.0**-43).log()
    return token_R, below_RV.gather(1, token_R[:, None])[:, 0] - log_sum_R, truncated_R
