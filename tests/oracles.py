"""Slow, dense, literal versions of the algorithms, to compare the engine with.

Nothing here may import `peft_nlsr`, share its tricks, or stay factored: raw arrays in, float64 out.
Written only from `methods.md` and `DESIGN.md`, never from the engine. "Paper" is NLSR, arXiv 2412.12497; "released" is
what its published code does. Letters: `A (r, d_in)`, `B (d_out, r)`, scale `s`, `dW = s B A`; suffix `t` fine-tuned,
`a` aligned, `0` weak, `e` reference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

Batch = Mapping[str, Tensor]
Row = tuple[Sequence[int], Sequence[int]]
"""Tokens of a prompt and of its answer."""
Draw = Callable[[Tensor], Tensor]
Adapter = Mapping[str, tuple[Tensor, Tensor, float]]
"""Module name -> (A, B, s); the order is the module order of ranks and draws."""
ReducedAdapter = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (A_hat, B_hat), the low-rank-reduced factors of the reference, from which masks are cut."""

Groups = Sequence[Sequence[str]]
"""Ends of module names of one block in data order; the modules of a group read the same input."""

GROUPS: Groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Those of a Llama block."""


def as_double(values: Any) -> Tensor:
    """A float64 copy of an array."""
    return torch.as_tensor(values).detach().clone().double()


def extrapolate_dense(A_a, B_a, s_a, A_0, B_0, s_0, beta: float) -> Tensor:
    """`dW_e = (1 + beta) dW_a - beta dW_0`, dense (paper eq. 2 on dW). `A_0 = None`: no weak adapter, `dW_0 = 0`."""
    dW_a = s_a * as_double(B_a) @ as_double(A_a)
    dW_0 = torch.zeros_like(dW_a) if A_0 is None else s_0 * as_double(B_0) @ as_double(A_0)
    return (1 + beta) * dW_a - beta * dW_0


def released_amplify(A, B, alpha: float) -> tuple[Tensor, Tensor]:
    """`(2 alpha A, 2 alpha B)`, every LoRA parameter replaced by alpha W + alpha W (released `expo-lora.py:77-81`)."""
    A, B = as_double(A), as_double(B)
    return alpha * A + alpha * A, alpha * B + alpha * B


def rank_kept_paper(rank: int, sparsity: float) -> int:
    """`r - int(r P_SR)`: r* = r (1 - P_SR) of eq. 3-6, whose rounding is set by the config (128, 0.8 -> 26)."""
    return rank - int(rank * sparsity)


def rank_kept_released(d_out: int, d_in: int, sparsity: float) -> int:
    """`int(min(out, in) P_SR)` of one lora_A or lora_B linear (`model_wrapper_low.py:220-226`; 128, 0.8 -> 102)."""
    return int(min(d_out, d_in) * sparsity)


def reduce_linear(W, Z, rank_keep: int) -> Tensor:
    """`V V^T W`, V the top right singular vectors of `Z W^T` (methods 1.2.4; SVD exact instead of randomised).

    W: `(out, in)`; Z: `(tokens, in)`. With `W_j X = (Z W^T)^T` this is U U^T W_j of paper eq. 3-6.
    """
    W, Z = as_double(W), as_double(Z)
    score = Z @ W.T
    _, _, right = torch.linalg.svd(score, full_matrices=False)
    V = right[:rank_keep].T
    return V @ V.T @ W


def low_rank_reduce(A, B, X, rank_keep: int) -> tuple[Tensor, Tensor]:
    """`(A_hat, B_hat)`: lora_A reduced on its inputs x, lora_B on its inputs `H = x A^T` of the unreduced A (1.2.4).

    X: `(tokens, d_in)`, the kept rows only.
    """
    H = as_double(X) @ as_double(A).T
    return reduce_linear(A, X, rank_keep), reduce_linear(B, H, rank_keep)


def wanda_scores(A, B, X) -> tuple[Tensor, Tensor]:
    """`|A_ij| ||X_:,j||` and `|B_ij| ||H_:,j||` with `H = X A^T` (methods 1.2.2)."""
    A, B, X = as_double(A), as_double(B), as_double(X)
    H = X @ A.T
    return A.abs() * X.norm(dim=0), B.abs() * H.norm(dim=0)


def snip_scores(W, per_sample_grads: Iterable[Any]) -> Tensor:
    """`|W| sum_k |dL_k / dW|`, each sample's gradient on its own (methods 1.2.3; the release adds them up)."""
    W = as_double(W)
    total = torch.zeros_like(W)
    for gradient in per_sample_grads:
        total += as_double(gradient).abs()
    return W.abs() * total


def magnitude(W) -> Tensor:
    """`|W|`: what the masks of the low-rank score are cut from, applied to the reduced factor (paper below eq. 6)."""
    return as_double(W).abs()


def top_k_tensor(score, sparsity: float) -> Tensor:
    """Exactly `n - int(n P_SR)` largest entries of the tensor; of equal ones the first in row-major order (paper)."""
    score = as_double(score)
    kept = score.numel() - int(score.numel() * sparsity)
    order = torch.argsort(-score.flatten(), stable=True)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.reshape(score.shape)


def released_threshold_tensor(score, sparsity: float) -> Tensor:
    """Entries strictly above `sorted(score)[int(n P_SR)]`, ties dropped (released `sparsity_ratio_low.py:36-53`).

    Without ties that is one entry fewer than :func:`top_k_tensor`. A threshold of 0 keeps every non-zero entry; there
    the release adds an unseeded random choice of the zeros.
    """
    score = as_double(score)
    threshold = score.flatten().sort().values[int(score.numel() * sparsity)]
    return score > threshold


def mask_row(score, sparsity: float) -> Tensor:
    """Each row without its `int(cols P_SR)` smallest; of equal scores the first is dropped (`prune.py:295, :324`)."""
    score = as_double(score)
    rows, columns = score.shape
    dropped = int(columns * sparsity)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for row in range(rows):
        mask[row, torch.argsort(score[row], stable=True)[:dropped]] = False
    return mask


def similarity_dense(A_e, B_e, A_t, B_t, mask_A, mask_B) -> float:
    """`S = <W'_e, W'_t> / (|W'_e| |W'_t|)` of `W' = (M^B o B)(M^A o A)` (paper eq. 7-8); 0.0 when either is zero."""
    mask_A, mask_B = as_double(mask_A), as_double(mask_B)
    masked_e = ((mask_B * as_double(B_e)) @ (mask_A * as_double(A_e))).flatten()
    masked_t = ((mask_B * as_double(B_t)) @ (mask_A * as_double(A_t))).flatten()
    norms = float(masked_e.norm() * masked_t.norm())
    return float(masked_e @ masked_t) / norms if norms > 0 else 0.0


def similarity_ranks(similarities: Sequence[float]) -> list[int]:
    """1 for the least similar module to N for the most similar; of equal ones the earlier module ranks lower."""
    return [
        1 + sum(other < own or (other == own and j < i) for j, other in enumerate(similarities))
        for i, own in enumerate(similarities)
    ]


def least_similar(similarities: Sequence[float], rate: float) -> list[bool]:
    """Restored are the `round(rate N)` least similar modules (DESIGN 2.5)."""
    count = round(rate * len(similarities))
    return [rank <= count for rank in similarity_ranks(similarities)]


def below_threshold(similarities: Sequence[float], threshold: float) -> list[bool]:
    """Restored is every module with `S_j < tau` (released `mask_replace`, methods 1.3)."""
    return [similarity < threshold for similarity in similarities]


def seeded_draw(seed: int) -> Draw:
    """Probabilities -> 0/1: one vector draw in module order from a CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda probabilities: torch.bernoulli(probabilities, generator=generator)


def bernoulli_paper(similarities: Sequence[float], P_L: float, delta: float, draw: Draw) -> tuple[list[bool], Tensor]:
    """`P_j = P_L + delta r_j / N`, `gamma_j ~ Bernoulli(P_j)`, restored where gamma is 0 (paper eq. 9-12).

    `P_j`, clipped to [0, 1], is the probability of being left alone, and highest for the most similar module.
    """
    count = len(similarities)
    chances = [min(1.0, max(0.0, P_L + delta * rank / count)) for rank in similarity_ranks(similarities)]
    probabilities = torch.tensor(chances, dtype=torch.float64)
    gamma = draw(probabilities)
    return [int(g) == 0 for g in gamma], probabilities


def bernoulli_released(
    similarities: Sequence[float], prune_rate: float, epsilon: float, draw: Draw
) -> tuple[list[bool], Tensor]:
    """Patched where the draw is 1, which the most similar module is likeliest to be (released `inner.py:98-126`).

    Rank N + 1 for the highest similarity down to 2 for the lowest, `norm = (rank - min) / (max - min)`,
    `P = (prune_rate - epsilon) + 2 epsilon norm`, clipped. One module is 0/0 in the release, and an error here.
    """
    if len(similarities) < 2:
        raise ValueError("the released probabilities divide by zero for a single module")
    ranks = [rank + 1 for rank in similarity_ranks(similarities)]
    low, high = min(ranks), max(ranks)
    chances = [(prune_rate - epsilon) + (rank - low) / (high - low) * 2 * epsilon for rank in ranks]
    probabilities = torch.tensor([min(1.0, max(0.0, chance)) for chance in chances], dtype=torch.float64)
    drawn = draw(probabilities)
    return [int(g) == 1 for g in drawn], probabilities


def sum_dense(A_t, B_t, s_t, A_e, B_e, s_e, mask_A, mask_B) -> Tensor:
    """`W'_e + W^'_t = s_e (M^B o B_e)(M^A o A_e) + s_t ((1 - M^B) o B_t)((1 - M^A) o A_t)` (paper eq. 12, on dW)."""
    mask_A, mask_B = as_double(mask_A), as_double(mask_B)
    safety_part = s_e * (mask_B * as_double(B_e)) @ (mask_A * as_double(A_e))
    other_part = s_t * ((1 - mask_B) * as_double(B_t)) @ ((1 - mask_A) * as_double(A_t))
    return safety_part + other_part


def swap(A_t, B_t, A_e, B_e, mask_A, mask_B) -> tuple[Tensor, Tensor]:
    """`(1 - M) o W_t + M o W_e` on A and on B (released `inner.py:172-184`); the product keeps the scale of `t`."""
    mask_A, mask_B = as_double(mask_A), as_double(mask_B)
    return (
        (1 - mask_A) * as_double(A_t) + mask_A * as_double(A_e),
        (1 - mask_B) * as_double(B_t) + mask_B * as_double(B_e),
    )


def one_shot_dense(dW_t, dW_e, C_s, C_u, lam: float, eps: float) -> Tensor:
    """`dW_t + (dW_e - dW_t) C_s (C_s + lam C_u + eps' I)^-1`, `eps' = eps mean diag(C_s + lam C_u)` (DESIGN 2.6).

    `C_s`, `C_u`: second moments `(d_in, d_in)` of the module's inputs on safety and on utility data.
    """
    dW_t, dW_e, C_s, C_u = as_double(dW_t), as_double(dW_e), as_double(C_s), as_double(C_u)
    both = C_s + lam * C_u
    ridge = eps * both.diagonal().mean() * torch.eye(len(both), dtype=torch.float64)
    return dW_t + (dW_e - dW_t) @ C_s @ torch.linalg.inv(both + ridge)


def truncate(D, rank: int) -> Tensor:
    """The best approximation of `D` of at most `rank` in the Frobenius norm (truncated SVD)."""
    left, values, right = torch.linalg.svd(as_double(D), full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]


def truncate_on_inputs(D, M, rank: int) -> Tensor:
    """The best `D_r` of at most `rank` under `|(D - D_r) M^(1/2)|`, `M (d_in, d_in)` (DESIGN 6).

    The truncated SVD `U_r S_r V_r^T` of `D M^(1/2)` times `M^(-1/2)`, written `U_r U_r^T D` because M may be singular.
    """
    D = as_double(D)
    values, vectors = torch.linalg.eigh(as_double(M))
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    left, _, _ = torch.linalg.svd(D @ root, full_matrices=False)
    return left[:, :rank] @ left[:, :rank].T @ D


def seen_moment(X, A) -> Tensor:
    """What `Z = X A^T` saw of `C = X^T X / n`: its Nystrom approximation from the rows of A, and the diagonal left.

    `(C A^T) (A C A^T)^+ (A C)` is the smallest second moment that equals `C` on those rows.
    """
    X, A = as_double(X), as_double(A)
    C = X.T @ X / len(X)
    seen = C @ A.T @ torch.linalg.pinv(A @ C @ A.T, hermitian=True, rtol=1e-7) @ A @ C
    return seen + torch.diag((C - seen).diagonal().clamp_min(0))


def norm_on_inputs(D, M) -> float:
    """`|D M^(1/2)|`: how large an update is on inputs of second moment `M (d_in, d_in)`."""
    D = as_double(D)
    return float(torch.trace(D @ as_double(M) @ D.T).clamp_min(0).sqrt())


def factors_of(D, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """`(A, B)` of exactly `rank` with `scale B A = D`, for a `D` of at most that rank."""
    D = as_double(D)
    left, values, right = torch.linalg.svd(D, full_matrices=False)
    A, B = torch.zeros(rank, D.shape[1], dtype=torch.float64), torch.zeros(D.shape[0], rank, dtype=torch.float64)
    kept = min(rank, len(values))
    A[:kept] = right[:kept]
    B[:, :kept] = left[:, :kept] * values[:kept] / scale
    return A, B


def two_teacher_module_dense(
    W0,
    Ws,
    Wf,
    x_s,
    xteacher_s,
    w_s,
    x_u,
    xtuned_u,
    w_u,
    lam: float,
    eps: float,
    *,
    rank: int | None = None,
    undone_s: Any = 0.0,
    share_s: Any = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(D, M, D_r)` of one module (DESIGN 6): the solution `T M^-1`, `M` with its ridge, `D` cut to a rank under `M`.

        T = sum_s w (Ws xteacher + u - W0 x) x^T + lam sum_u w (Wf xtuned - W0 x) x^T + eps' (Wf - W0)
        M = sum_s w x x^T + lam sum_u w x x^T + eps' I,   eps' = eps mean diag of M before its ridge

    Inputs `(tokens, d_in)`, token weights `(tokens,)`, normalised here to sum one on each data set and then, those of
    the safety data, times `share_s` `(tokens,)`; `undone_s` `u` `(tokens, d_out)`. `rank=None`: `D_r = D`.
    """
    W0, Ws, Wf = as_double(W0), as_double(Ws), as_double(Wf)
    d_in = W0.shape[1]
    T = torch.zeros_like(W0)
    M = torch.zeros(d_in, d_in, dtype=torch.float64)
    streams = ((share_s, Ws, x_s, xteacher_s, w_s, undone_s), (lam, Wf, x_u, xtuned_u, w_u, 0.0))
    for share, W_teacher, x, x_teacher, weights, undone in streams:
        x, x_teacher, weights = as_double(x), as_double(x_teacher), as_double(weights)
        weights = share * weights / weights.sum()
        wanted = x_teacher @ W_teacher.T + as_double(undone) - x @ W0.T
        T += wanted.T @ torch.diag(weights) @ x
        M += x.T @ torch.diag(weights) @ x
    ridge = eps * M.diagonal().mean()
    T += ridge * (Wf - W0)
    M += ridge * torch.eye(d_in, dtype=torch.float64)
    D = T @ torch.linalg.inv(M)
    return D, M, D if rank is None else truncate_on_inputs(D, M, rank)


def two_teacher_model_oracle(
    model: PeftModel,
    adapter_name: str,
    safety_batch: Batch,
    utility_batch: Batch,
    weights: tuple[Tensor, Tensor],
    lam: float,
    eps: float,
    *,
    safe: PeftModel | None = None,
    groups: Groups = GROUPS,
    corrects: str | None = "down_proj",
    refusals: Tensor | None = None,
    lookalike_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Module name -> dense `dW''` of rank at most the adapter's, solved block by block in data order (DESIGN 6).

    Three models run in full for every group of modules: the partly repaired one (on both batches), the safe teacher
    (on the safety batch) and the fine-tuned one as it came (on the utility batch).

    Args:
        model: a decoder with LoRA on linear layers of its blocks; it is not changed.
        safety_batch: keyword arguments of the forward, `input_ids` and `attention_mask`.
        utility_batch: likewise.
        weights: token weights `(batch, time)` of the safety and of the utility batch, 0 on padding.
        safe: the safe teacher, LoRA of any rank on the same base; None is the base, with the adapter disabled.
        groups: which modules a block has, and their order.
        corrects: end of the name of the module that makes good, on the safety batch, what is left undone: how far the
            hidden state behind its block is from the teacher's, before its output is added.
        refusals: `(batch,)`, the rows of the safety batch where it does so; None: all.
        lookalike_weight: what the other rows weigh, beside 1.
    """
    w_s, w_u = weights
    tuned = float64_copy(model, adapter_name)
    repaired = float64_copy(model, adapter_name)
    safe = zeroed_copy(model, adapter_name) if safe is None else float64_copy(safe, adapter_name)
    solution = {}
    for group in in_data_order(lora_layers(repaired, adapter_name), groups):
        x_s = inputs_of_group(repaired, group, safety_batch, w_s > 0)
        x_u = inputs_of_group(repaired, group, utility_batch, w_u > 0)
        xteacher_s = inputs_of_group(safe, group, safety_batch, w_s > 0)
        xtuned_u = inputs_of_group(tuned, group, utility_batch, w_u > 0)
        counts = torch.ones(len(w_s), dtype=torch.bool) if refusals is None else refusals
        counts = counts[:, None].expand_as(w_s)[w_s > 0]
        undone = {
            name: counts[:, None]
            * (rest_of_block(safe, name, safety_batch, w_s > 0) - rest_of_block(repaired, name, safety_batch, w_s > 0))
            for name in group
            if corrects is not None and name.endswith(corrects)
        }
        for name in group:
            base = base_weight(lora_layers(repaired, adapter_name)[name])
            A_s, B_s, safe_scale = factors(lora_layers(safe, adapter_name)[name], adapter_name)
            A_t, B_t, scale = factors(lora_layers(tuned, adapter_name)[name], adapter_name)
            _, _, solution[name] = two_teacher_module_dense(
                W0=base,
                Ws=base + safe_scale * B_s @ A_s,
                Wf=base + scale * B_t @ A_t,
                x_s=x_s[name],
                xteacher_s=xteacher_s[name],
                w_s=w_s[w_s > 0],
                x_u=x_u[name],
                xtuned_u=xtuned_u[name],
                w_u=w_u[w_u > 0],
                lam=lam,
                eps=eps,
                rank=A_t.shape[0],
                undone_s=undone.get(name, 0.0),
                share_s=torch.where(counts, 1.0, lookalike_weight).double(),
            )
        for name in group:
            layer = lora_layers(repaired, adapter_name)[name]
            A_t, _, scale = factors(layer, adapter_name)
            write_factors(layer, adapter_name, *factors_of(solution[name], A_t.shape[0], scale))
    return solution


class Outcome(NamedTuple):
    """What a pipeline decided and made, everything in module order."""

    masks: dict[str, tuple[Tensor, Tensor]]
    similarities: dict[str, float]
    probabilities: Tensor
    restored: dict[str, bool]
    factors: dict[str, tuple[Tensor, Tensor]] | None
    dense: dict[str, Tensor]


def paper_reduce(
    reference: Adapter, inputs: Mapping[str, Tensor], sparsity: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """The reference's factors reduced to rank `r - int(r P_SR)` on stored module inputs (paper eq. 3-6, parallel)."""
    return {
        name: low_rank_reduce(A, B, inputs[name], rank_kept_paper(len(A), sparsity))
        for name, (A, B, _) in reference.items()
    }


def paper_pipeline(
    tuned: Adapter,
    reference: Adapter,
    reduced: ReducedAdapter,
    *,
    sparsity: float,
    P_L: float,
    delta: float,
    draw: Draw,
) -> Outcome:
    """Paper stages 2 and 3 from reduced factors: top-k per tensor, eq. 7-9, eq. 12 where restored, else `dW_t`.

    `Outcome.dense` holds the updates, scales included, of rank up to 2r; `factors` is None: eq. 12 has none of rank r.
    """
    masks = {}
    for name in tuned:
        A_hat, B_hat = reduced[name]
        masks[name] = top_k_tensor(magnitude(A_hat), sparsity), top_k_tensor(magnitude(B_hat), sparsity)
    similarities = masked_similarities(tuned, reference, masks)
    flags, probabilities = bernoulli_paper(list(similarities.values()), P_L, delta, draw)
    restored = dict(zip(tuned, flags, strict=True))
    dense = {}
    for name, (A_t, B_t, s_t) in tuned.items():
        A_e, B_e, s_e = reference[name]
        dense[name] = (
            sum_dense(A_t, B_t, s_t, A_e, B_e, s_e, *masks[name])
            if restored[name]
            else s_t * as_double(B_t) @ as_double(A_t)
        )
    return Outcome(masks, similarities, probabilities, restored, None, dense)


def released_pipeline(
    tuned: Adapter,
    reference: Adapter,
    reduced: ReducedAdapter,
    *,
    sparsity: float,
    prune_rate: float,
    epsilon: float,
    draw: Draw,
) -> Outcome:
    """Released stages 2 and 3 from reduced factors: strict per-tensor threshold, inverted selection, entry-wise swap.

    The reference is the amplified adapter, whose reduced form gives the masks and whose own entries are the patches
    (`sparsity_ratio_low.py`, `inner.py`). Scales play no part but in `Outcome.dense`, which uses those of `tuned`.
    """
    masks = {}
    for name in tuned:
        A_hat, B_hat = reduced[name]
        masks[name] = (
            released_threshold_tensor(magnitude(A_hat), sparsity),
            released_threshold_tensor(magnitude(B_hat), sparsity),
        )
    similarities = masked_similarities(tuned, reference, masks)
    flags, probabilities = bernoulli_released(list(similarities.values()), prune_rate, epsilon, draw)
    restored = dict(zip(tuned, flags, strict=True))
    edited = {}
    dense = {}
    for name, (A_t, B_t, s_t) in tuned.items():
        A_e, B_e, _ = reference[name]
        edited[name] = swap(A_t, B_t, A_e, B_e, *masks[name]) if restored[name] else (as_double(A_t), as_double(B_t))
        dense[name] = s_t * edited[name][1] @ edited[name][0]
    return Outcome(masks, similarities, probabilities, restored, edited, dense)


def masked_similarities(
    tuned: Adapter, reference: Adapter, masks: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """:func:`similarity_dense` of every module, in module order."""
    return {
        name: similarity_dense(*reference[name][:2], A_t, B_t, *masks[name]) for name, (A_t, B_t, _) in tuned.items()
    }


def released_reduce_sequential(
    model: PeftModel, batches: Sequence[Batch], kept_positions: Sequence[Tensor], rank_keep: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> `(A_hat, B_hat)`, block by block (released `model_wrapper_low.py:135-256`, SVD exact).

    Each block is calibrated once, by full forward passes of a model whose earlier blocks are reduced; lora_A and
    lora_B of all its modules are reduced from that calibration, so lora_B sees `x A^T` of its still unreduced A.

    Args:
        model: the (amplified) reference adapter on its base, its active adapter; it is not changed.
        batches: keyword arguments of the forward.
        kept_positions: per batch a boolean `(batch, time)`, True where a token enters the statistics.
    """
    name_of_adapter = model.active_adapter
    partly_reduced = float64_copy(model, name_of_adapter)
    layers = lora_layers(partly_reduced, name_of_adapter)
    reduced = {}
    for block in sorted({block_index(name) for name in layers}):
        of_block = {name: layer for name, layer in layers.items() if block_index(name) == block}
        linears = {(name, "A"): layer.lora_A[name_of_adapter] for name, layer in of_block.items()}
        linears |= {(name, "B"): layer.lora_B[name_of_adapter] for name, layer in of_block.items()}
        Z = recorded_inputs(partly_reduced, linears, batches, kept_positions)
        for name in of_block:
            reduced[name] = (
                reduce_linear(linears[name, "A"].weight, Z[name, "A"], rank_keep),
                reduce_linear(linears[name, "B"].weight, Z[name, "B"], rank_keep),
            )
        for name, layer in of_block.items():
            write_factors(layer, name_of_adapter, *reduced[name])
    return reduced


def module_inputs(
    model: PeftModel, adapter_name: str, batches: Sequence[Batch], kept_positions: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Module name -> inputs `(tokens, d_in)` of its LoRA layer at the kept positions, unreduced (E3, parallel)."""
    model = float64_copy(model, adapter_name)
    return recorded_inputs(model, lora_layers(model, adapter_name), batches, kept_positions)


def zeroed_copy(model: PeftModel, adapter_name: str) -> PeftModel:
    """A float64 copy that computes like its base: its adapter is there, with factors of zero."""
    model = float64_copy(model, adapter_name)
    for layer in lora_layers(model, adapter_name).values():
        A, B, _ = factors(layer, adapter_name)
        write_factors(layer, adapter_name, 0 * A, 0 * B)
    return model


@torch.no_grad()
def base_weight(layer: LoraLayer) -> Tensor:
    """`W0 (d_out, d_in)` of whatever a LoRA layer wraps: what its base answers to unit vectors, without the bias."""
    base = layer.get_base_layer()
    unit = torch.eye(layer.in_features, dtype=torch.float64)
    return (base(unit) - base(0 * unit)).T


def float64_copy(model: PeftModel, adapter_name: str) -> PeftModel:
    """A float64 copy in evaluation mode with one active adapter."""
    model = copy.deepcopy(model).double().eval()
    model.set_adapter(adapter_name)
    return model


def lora_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapter in module order, by the names that their linears have in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def block_index(name: str) -> int:
    """The number of the decoder block that a module is in."""
    return int(re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name).group(1))


def in_data_order(names: Iterable[str], groups: Groups = GROUPS) -> list[list[str]]:
    """Module names in groups: block after block, in a block group after group."""
    names = list(names)
    ordered = [
        [name for name in names if block_index(name) == block and name.endswith(tuple(group))]
        for block in sorted({block_index(name) for name in names})
        for group in groups
    ]
    if sum(map(len, ordered)) != len(names):
        raise ValueError(f"a module of {names} is not in exactly one group of {groups}")
    return [group for group in ordered if group]


def factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor, float]:
    """`(A, B, s)` of a LoRA layer."""
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return as_double(A), as_double(B), layer.scaling[adapter_name]


@torch.no_grad()
def write_factors(layer: LoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> None:
    """Overwrite the factors of a LoRA layer."""
    layer.lora_A[adapter_name].weight.copy_(A)
    layer.lora_B[adapter_name].weight.copy_(B)


def inputs_of_group(model: PeftModel, names: Sequence[str], batch: Batch, kept: Tensor) -> dict[str, Tensor]:
    """Module name -> inputs `(tokens, d_in)` at the kept positions of one batch."""
    modules = {name: model.get_submodule(f"base_model.model.{name}") for name in names}
    return recorded_inputs(model, modules, [batch], [kept])


@torch.no_grad()
def rest_of_block(model: PeftModel, name: str, batch: Batch, kept: Tensor) -> Tensor:
    """Hidden states `(tokens, d)` behind a module's block less the module's own output, at the kept positions."""
    module = f"base_model.model.{name}"
    block = re.match(r".*?\.\d+(?=\.)", module)
    assert block is not None
    seen = []
    for place in (block[0], module):
        handle = model.get_submodule(place).register_forward_hook(lambda _, args, out: seen.append(out))
        model(**batch)
        handle.remove()
    after, own = (out[0] if isinstance(out, tuple) else out for out in seen)
    return (after.flatten(0, -2) - own.flatten(0, -2))[kept.flatten()]


@torch.no_grad()
def recorded_inputs(
    model: PeftModel,
    modules: Mapping[Any, torch.nn.Module],
    batches: Sequence[Batch],
    kept_positions: Sequence[Tensor] | None,
) -> dict[Any, Tensor]:
    """Key -> the inputs `(tokens, d_in)` of a module at the kept positions (None: all), from full forward passes."""
    seen: dict[Any, list[Tensor]] = {key: [] for key in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0]))
        for key, module in modules.items()
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    rows = {key: [x.flatten(0, -2) for x in per_batch] for key, per_batch in seen.items()}
    if kept_positions is not None:
        kept = [positions.bool().flatten() for positions in kept_positions]
        rows = {key: [x[k] for x, k in zip(xs, kept, strict=True)] for key, xs in rows.items()}
    return {key: torch.cat(xs) for key, xs in rows.items()}


def snip_sums(model: PeftModel, adapter_name: str, rows: Sequence[Row]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> `(sum_k |dL_k/dA|, sum_k |dL_k/dB|)`, sample after sample without padding (methods 1.2.3).

    `L_k` is the mean negative log-likelihood of the answer of row k, as transformers computes it.
    """
    model = float64_copy(model, adapter_name)
    return summed_gradients(model, adapter_name, (model(**pad([row])).loss for row in rows))


def preference_snip_sums(
    model: PeftModel, adapter_name: str, chosen: Sequence[Row], rejected: Sequence[Row], beta: float = 0.1
) -> dict[str, tuple[Tensor, Tensor]]:
    """The same with the DPO loss of a pair; its reference is the model with the adapter disabled (methods 1.2.3)."""
    model = float64_copy(model, adapter_name)

    def log_likelihood(row: Row) -> Tensor:
        return -model(**pad([row])).loss * len(row[1])

    def losses() -> Iterator[Tensor]:
        for good, bad in zip(chosen, rejected, strict=True):
            with torch.no_grad(), model.disable_adapter():
                reference = log_likelihood(good) - log_likelihood(bad)
            yield -torch.log(torch.sigmoid(beta * (log_likelihood(good) - log_likelihood(bad) - reference)))

    return summed_gradients(model, adapter_name, losses())


def summed_gradients(
    model: PeftModel, adapter_name: str, losses: Iterable[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> sums over the losses of the absolute gradient of A and of B, each from its own backward pass."""
    layers = lora_layers(model, adapter_name)
    weights = [
        w for layer in layers.values() for w in (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
    ]
    totals = [torch.zeros_like(weight) for weight in weights]
    for loss in losses:
        for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.abs()
    return dict(zip(layers, zip(totals[::2], totals[1::2], strict=True), strict=True))


def random_factors(d_out: int, d_in: int, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Normal `(A, B)` in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)


def random_rows(count: int, *, seed: int) -> list[Row]:
    """Prompts of 2 to 5 and answers of 1 to 4 tokens between 3 and 63."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(shortest: int) -> tuple[int, ...]:
        length = int(torch.randint(shortest, shortest + 4, (1,), generator=generator))
        return tuple(torch.randint(3, 64, (length,), generator=generator).tolist())

    return [(tokens(2), tokens(1)) for _ in range(count)]


def pad(rows: Sequence[Row], *, side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (-100 outside the answer), `extra` longer than the longest row."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows) + extra
    padded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        missing = longest - len(prompt) - len(answer)
        row = {
            "input_ids": [*prompt, *answer],
            "attention_mask": [1] * (longest - missing),
            "labels": [-100] * len(prompt) + list(answer),
        }
        for key, values in row.items():
            filling = [-100 if key == "labels" else 0] * missing
            padded[key].append(values + filling if side == "right" else filling + values)
    return {key: torch.tensor(values) for key, values in padded.items()}


def decision_weights(rows: Sequence[Row], weight: float) -> Tensor:
    """Token weights for :func:`pad`: 1 on every token, `weight` on the last one of each prompt, 0 on padding."""
    weights = pad(rows)["attention_mask"].double()
    for index, (prompt, _) in enumerate(rows):
        weights[index, len(prompt) - 1] = weight
    return weights


def gap(found: Any, expected: Any) -> float:
    """`|found - expected| / |expected|` in the Frobenius norm; the norm of `found` when nothing is expected."""
    found, expected = as_double(found), as_double(expected)
    if found.shape != expected.shape:
        raise ValueError(f"found shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    return float((found - expected).norm() / (expected.norm() if expected.any() else 1.0))


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that a caller could find changed: parameters and buffers bit by bit, identities, flags, hooks."""
    tensors = {f"{name} {id(p)} {p.data_ptr()} {p.requires_grad}": p for name, p in model.named_parameters()}
    tensors |= {f"{name} {id(b)}": b for name, b in model.named_buffers()}
    modules = {
        name: (
            module.training,
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            getattr(module, "disable_adapters", None) if isinstance(module, LoraLayer) else None,
            list(module.active_adapters) if isinstance(module, LoraLayer) else None,
        )
        for name, module in model.named_modules()
    }
    return {"tensors": {key: tensor.detach().clone() for key, tensor in tensors.items()}, "modules": modules}


def assert_same_state(model: torch.nn.Module, before: Mapping[str, Any]) -> None:
    """The model is what it was when `before` was taken with :func:`state_of`."""
    now = state_of(model)
    assert now["modules"] == before["modules"]
    assert list(now["tensors"]) == list(before["tensors"])
    for key, tensor in now["tensors"].items():
        assert torch.equal(tensor, before["tensors"][key]), key
