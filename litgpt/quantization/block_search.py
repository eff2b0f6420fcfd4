"""Codes and scales for the blocks of GGUF files: those whose values are nearest to a matrix.

Rounding to even steps between the smallest and the largest value of a group wastes steps on the ends. What is searched
for here is the step s and the offset m that leave the least

    sum of w (x - (s q - m))^2,     q = round((x + m) / s) within the range of the codes

For a given choice of codes, the best s and m are a weighted least-squares fit; so for several steps around the even
ones codes are chosen, s and m fitted, and the best fit kept. In blocks of 256 values, the groups' s and m are whole
numbers of 6 or 8 bits times one number for all; these are chosen, fitted and varied by one in the same way, and what
leaves less is kept.

The weights w say what an error costs. An output is a sum of weights times inputs, so that an error in a column costs
what the mean square of that input is (`importance`, from calibration text); without that, all columns cost the same. In
either case an error in a large weight costs somewhat more (`_cost`), which was measured to give the lower perplexity.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt.quantization.blocks import FORMATS, BlockFormat, Levels

_AT_ONCE = 2**17  # values: what is worked on stays in a CPU's cache
_HALF_MAX = 65504.0
_TRIES = [number / 10 for number in range(-14, 11, 2)]  # by how many steps more or fewer a range is divided
_AGAIN = [None, None]  # then the best one is fitted again
# Most that a code can be: with an offset they begin at 0, without one at its negative, less one.
_LARGEST = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 128, "q4_k": 15, "q5_k": 31, "q6_k": 32}


class _Found(NamedTuple):
    """What a group is made of, all (groups, N)."""

    step: Tensor
    offset: Tensor
    error: Tensor


@torch.no_grad()
def quantised(values: Tensor, form: str, importance: Tensor | None = None) -> Tensor:
    """A matrix in blocks.

    Args:
        values: (rows, columns), which the values of a block divide.
        form: The format, one of `FORMATS` that can be written.
        importance: (columns,) what an error in each costs; None where all cost the same.

    Returns:
        (rows, bytes) uint8.
    """
    layout = FORMATS[form]
    rows = max(1, _AT_ONCE // values.size(1))
    parts = [_some_rows(part.float(), layout, importance) for part in values.split(rows)]
    return torch.cat(parts) if parts else values.new_empty(0, layout.row_bytes(values.size(1)), dtype=torch.uint8)


def _some_rows(values: Tensor, form: BlockFormat, importance: Tensor | None) -> Tensor:
    assert form.pack is not None  # those that are only read are refused before
    x = _by_group(values, form)
    if form.name == "q8_0":
        w = torch.ones_like(x)  # so fine a grid gains nothing by a search
        levels = _around_zero(x, w, form.name, tries=[-1.0])
    else:
        w = _cost(x, values, importance, form)
        if form.values == 32:
            levels = (_with_offset if form.name.endswith("1") else _around_zero)(x, w, form.name)
        else:
            levels = (_in_groups_around_zero if form.name == "q6_k" else _in_groups)(x, w, form.name)
    return form.pack(levels).view(len(values), form.row_bytes(values.size(1)))


def _by_group(values: Tensor, form: BlockFormat) -> Tensor:
    """(rows, columns) -> (values of a group, groups, N blocks): sums over a group run along whole vectors."""
    blocks = values.reshape(-1, form.values // form.group, form.group)
    return blocks.permute(2, 1, 0).contiguous()


def _cost(x: Tensor, values: Tensor, importance: Tensor | None, form: BlockFormat) -> Tensor:
    """What an error costs, as x."""
    if importance is None:
        return (x.square().mean(dim=0, keepdim=True) + x.square()).sqrt()
    # A column that was given nothing may be given something yet.
    relative = (importance.float() / importance.float().mean().clamp(min=1e-30)).clamp(min=1e-4)
    of_columns = _by_group(relative[None].expand_as(values), form)
    return of_columns * (x.square().mean(dim=(0, 1), keepdim=True) + x.square()).sqrt()


def _codes(levels: Tensor) -> Tensor:
    """(values of a group, groups, N) -> (N, groups, values of a group)."""
    return levels.permute(2, 1, 0).to(torch.int16)


def _as_half(number: Tensor) -> Tensor:
    return number.clamp(-_HALF_MAX, _HALF_MAX).half().float()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where it would be none."""
    return torch.where(denominator == 0, 0, numerator / denominator)


# --- a step, and an offset, for every group --------------------------------------------------------------------------


def _fitted_with_offset(x: Tensor, w: Tensor, largest: int, no_positive: bool) -> _Found:
    """The best s and m of each group; with `no_positive`, m is at least 0."""
    low, high = x.amin(dim=0), x.amax(dim=0)
    if no_positive:
        low = low.clamp(max=0)
    wx = w * x
    sum_w, sum_x, sum_xx = w.sum(dim=0), wx.sum(dim=0), (wx * x).sum(dim=0)
    best = _Found(torch.zeros_like(low), -low, torch.full_like(low, torch.inf))
    for more in (*_TRIES, *_AGAIN):
        if more is None:
            q = _ratio(x + best.offset, best.step)
        else:
            q = (x - low) * _ratio(torch.full_like(low, largest + more), high - low)
        q = q.round_().clamp_(0, largest)
        wq = w * q
        sum_q, sum_qq, sum_xq = wq.sum(dim=0), (wq * q).sum(dim=0), (wx * q).sum(dim=0)
        determinant = sum_w * sum_qq - sum_q.square()
        step = _ratio(sum_w * sum_xq - sum_x * sum_q, determinant)
        added = _ratio(sum_x - step * sum_q, sum_w)
        if no_positive:
            step = torch.where(added > 0, _ratio(sum_xq, sum_qq), step)
            added = added.clamp(max=0)
        # The square written out; s and what is added may be no joint optimum.
        error = sum_xx + step.square() * sum_qq + added.square() * sum_w
        error += 2 * (step * added * sum_q - step * sum_xq - added * sum_x)
        better = (error < best.error) & (step >= 0)
        new = _Found(step, -added, error)
        best = _Found(*(torch.where(better, a, b) for a, b in zip(new, best, strict=True)))
    return best


def _fitted_around_zero(x: Tensor, w: Tensor, largest: int, tries: list[float]) -> _Found:
    """The best s of each group; codes are from -largest to largest - 1, so that the step has the sign that helps."""
    place = x.abs().argmax(dim=0, keepdim=True)
    extreme = x.gather(0, place)[0]
    wx = w * x
    sum_xx = (wx * x).sum(dim=0)
    best = _Found(torch.zeros_like(extreme), torch.zeros_like(extreme), torch.full_like(extreme, torch.inf))
    for more in (*tries, *_AGAIN):
        if more is None:
            q = _ratio(x, best.step)
        else:
            q = x * _ratio(torch.full_like(extreme, -largest - more), extreme)
        q = q.round_().clamp_(-largest, largest - 1)
        sum_qq, sum_xq = (w * q * q).sum(dim=0), (wx * q).sum(dim=0)
        step = _ratio(sum_xq, sum_qq)
        error = sum_xx - step * sum_xq
        better = error < best.error
        best = _Found(torch.where(better, step, best.step), best.offset, torch.where(better, error, best.error))
    return best


def _with_offset(x: Tensor, w: Tensor, name: str) -> Levels:
    """q4_1, q5_1."""
    largest = _LARGEST[name]
    found = _fitted_with_offset(x, w, largest, no_positive=False)
    step, offset = _as_half(found.step), _as_half(found.offset)
    q = _ratio(x + offset, step).round_().clamp_(0, largest)
    return Levels(_codes(q), step[0], minimum=offset[0])


def _around_zero(x: Tensor, w: Tensor, name: str, tries: list[float] = _TRIES) -> Levels:
    """q4_0, q5_0, q8_0."""
    largest = _LARGEST[name]
    step = _as_half(_fitted_around_zero(x, w, largest, tries).step)
    q = _ratio(x, step).round_().clamp_(-largest, largest - 1)
    return Levels(_codes(q), step[0])


# --- groups whose steps and offsets are whole numbers times one number of the block ----------------------------------


class _Choice(NamedTuple):
    """A block's numbers (N,), its groups' whole numbers (groups, N), the codes, and what error is left (groups, N)."""

    scale: Tensor
    minimum: Tensor
    scales: Tensor
    minimums: Tensor
    codes: Tensor
    error: Tensor


class _Blocks:
    """Blocks of several groups, and the choices for them.

    Args:
        x: (values of a group, groups, N).
        w: What errors cost.
        codes: The range of the codes.
        scales: The range of the groups' whole numbers.
    """

    def __init__(self, x: Tensor, w: Tensor, codes: tuple[int, int], scales: tuple[int, int]) -> None:
        self.x, self.w, self.codes, self.scales = x, w, codes, scales

    def choice(self, scale: Tensor, minimum: Tensor, scales: Tensor, minimums: Tensor) -> _Choice:
        """The best codes for the rest."""
        step, offset = scale * scales, minimum * minimums
        q = _ratio(self.x + offset, step).round_().clamp_(*self.codes)
        error = (self.w * (self.x - (step * q - offset)).square_()).sum(dim=0)
        return _Choice(scale, minimum, scales, minimums, q, error)

    def first(self, found: _Found, scale: Tensor, minimum: Tensor) -> _Choice:
        """Of the groups' own steps and offsets."""
        scale, minimum = _as_half(scale), _as_half(minimum)
        scales = _ratio(found.step, scale.expand_as(found.step)).round_().clamp_(*self.scales)
        minimums = _ratio(found.offset, minimum.expand_as(found.offset)).round_().clamp_(*self.scales)
        return self.choice(scale, minimum, scales, minimums)

    def refitted(self, old: _Choice) -> _Choice:
        """With the block's two numbers fitted to the codes, in blocks where that is better."""
        a, b = old.scales * old.codes, -old.minimums
        wa = self.w * a
        aa, ab, bb = (wa * a).sum(dim=(0, 1)), (wa * b).sum(dim=(0, 1)), (self.w * b * b).sum(dim=(0, 1))
        xa, xb = (wa * self.x).sum(dim=(0, 1)), (self.w * self.x * b).sum(dim=(0, 1))
        determinant = aa * bb - ab.square()
        solvable = determinant > 1e-6 * aa * bb
        scale = torch.where(solvable, _ratio(xa * bb - xb * ab, determinant), _ratio(xa, aa))
        minimum = torch.where(solvable, _ratio(xb * aa - xa * ab, determinant), 0)
        new = self.choice(_as_half(scale), _as_half(minimum.clamp(min=0)), old.scales, old.minimums)
        return _better(new.error.sum(dim=0) < old.error.sum(dim=0), new, old)

    def varied(self, old: _Choice, steps: Iterator[tuple[int, int]]) -> _Choice:
        """With a group's whole numbers changed, in groups where that is better."""
        best = old
        for scales, minimums in steps:
            new = self.choice(
                old.scale,
                old.minimum,
                (old.scales + scales).clamp_(*self.scales),
                (old.minimums + minimums).clamp_(*self.scales),
            )
            best = _better(new.error < best.error, new, best)
        return best

    def searched(self, choice: _Choice, steps: list[tuple[int, int]]) -> _Choice:
        for _ in range(2):
            choice = self.varied(self.refitted(choice), iter(steps))
        return self.refitted(choice)


def _better(where: Tensor, new: _Choice, old: _Choice) -> _Choice:
    """`where` is (N,) or (groups, N); a block's own numbers only differ in the first case."""
    return _Choice(*(torch.where(where, a, b) if a.dim() >= where.dim() else b for a, b in zip(new, old, strict=True)))


def _in_groups(x: Tensor, w: Tensor, name: str) -> Levels:
    """q4_k, q5_k."""
    blocks = _Blocks(x, w, (0, _LARGEST[name]), (0, 63))
    found = _fitted_with_offset(x, w, _LARGEST[name], no_positive=True)
    first = blocks.first(found, found.step.amax(dim=0) / 63, found.offset.amax(dim=0) / 63)
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    best = blocks.searched(first, steps)
    whole = best.scales.T.to(torch.uint8), best.minimums.T.to(torch.uint8)
    return Levels(_codes(best.codes), best.scale, whole[0], best.minimum, whole[1])


def _in_groups_around_zero(x: Tensor, w: Tensor, name: str) -> Levels:
    """q6_k."""
    largest = _LARGEST[name]
    blocks = _Blocks(x, w, (-largest, largest - 1), (-128, 127))
    found = _fitted_around_zero(x, w, largest, _TRIES)
    extreme = found.step.gather(0, found.step.abs().argmax(dim=0, keepdim=True))[0]
    first = blocks.first(found, extreme / -128, torch.zeros_like(extreme))
    best = blocks.searched(first, [(-1, 0), (1, 0)])
    return Levels(_codes(best.codes), best.scale, best.scales.T.to(torch.int8))
