"""Algebra of LoRA factors: pairs, averages of factors and of products, and alignment by rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lift.models.adapters import AdapterTensor, RandomAdapter

__all__ = ["aligned", "fusion", "lora_pairs", "mixture"]


def fusion(thetas: Tensor, weights: Tensor) -> Tensor:
    r"""Average LoRAs ``[K, D]`` with weights ``[K]`` to ``[D]``, A and B apart.

    .. math:: A = \sum_k w_k A_k, \qquad B = \sum_k w_k B_k

    References:
        LoraRetriever, Zhao et al., 2024, arXiv:2402.09997, whose "fusion" this is.
    """
    return weights.to(thetas) @ thetas


def mixture(adapter: RandomAdapter, thetas: Tensor, weights: Tensor) -> Tensor:
    r"""Average the products B A of LoRAs ``[K, D]`` with weights ``[K]``, brought back to the adapter's rank, ``[D]``.

    Singular values are shared out evenly, B gets :math:`U \sqrt s` and A :math:`\sqrt s V^\top`. Where a singular
    value is zero, A takes its row from the weighted mean and B stays at zero: with both at zero there would be no
    gradient to leave by. Tensors that are no LoRA factors are averaged.

    Raises:
        ValueError: an adapter without matrix LoRA factors.
    """
    pairs = lora_pairs(adapter)
    if not pairs:
        names = ", ".join(entry.name for entry in adapter.layout[:3])
        raise ValueError(
            f"no LoRA factors among {names}, ...: only LoRA's products can be mixed. "
            'Use composition="fusion", which averages any adapter.'
        )
    result = fusion(thetas, weights)
    for a, b in pairs:
        A = thetas[:, a.part].view(-1, *a.shape)
        B = thetas[:, b.part].view(-1, *b.shape)
        left = (weights.to(thetas).view(-1, 1, 1) * B).transpose(0, 1).flatten(1)  # [out, K r]
        factors = _truncated(left, A.flatten(0, 1), a.shape[0], result[a.part].view(a.shape))
        result[b.part], result[a.part] = factors[0].reshape(-1), factors[1].reshape(-1)
    return result


def _truncated(left: Tensor, right: Tensor, rank: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``left @ right`` best at a rank, by a decomposition no larger than the inner dimension."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    U, s, V = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    U, s, V = U[:, :rank], s[:rank], V[:rank]
    alive = s > s.max() * torch.finfo(s.dtype).eps * max(left.shape)
    B = torch.zeros(left.shape[0], rank, dtype=left.dtype, device=left.device)
    A = spare.clone()
    count = int(alive.sum())
    root = s[:count].sqrt()
    B[:, :count] = (q_left @ U[:, :count]) * root
    A[:count] = root.unsqueeze(-1) * (V[:count] @ q_right.T)
    return B, A


def lora_pairs(adapter: RandomAdapter) -> list[tuple[AdapterTensor, AdapterTensor]]:
    """Return the factors A ``[r, in]`` and B ``[out, r]`` of every product of matrices; none for other adapters."""
    named = {entry.name: entry for entry in adapter.layout}
    pairs = [(a, named.get(name.replace("lora_A", "lora_B"))) for name, a in named.items() if "lora_A" in name]
    return [(a, b) for a, b in pairs if b is not None and len(a.shape) == 2 == len(b.shape)]


def aligned(adapter: RandomAdapter, thetas: Tensor, rounds: int = 10) -> Tensor:
    r"""Turn each product's factors by a rotation of their own towards the mean of all; the products stay.

    Generalised orthogonal Procrustes: for task i and product l, :math:`R = \arg\min \lVert R A_i - \bar A\rVert^2 +
    \lVert B_i R^\top - \bar B\rVert^2` over orthogonal R, which is :math:`V U^\top` of the singular vectors of
    :math:`A_i \bar A^\top + B_i^\top \bar B`; the means begin at the first adapter. Adapters that differ by a rotation
    come to lie on one another; those whose row spaces differ stay apart, as much as they must.

    References:
        Generalized Procrustes analysis, Gower, 1975.
    """
    turned = thetas.clone()
    for a, b in lora_pairs(adapter):
        A = thetas[:, a.part].reshape(len(thetas), *a.shape).double()
        B = thetas[:, b.part].reshape(len(thetas), *b.shape).double()
        mean_A, mean_B = A[0], B[0]
        for _ in range(rounds):
            U, _, Vh = torch.linalg.svd(A @ mean_A.T + B.mT @ mean_B)
            R = Vh.mT @ U.mT
            new_A, new_B = R @ A, B @ R.mT
            mean_A, mean_B = new_A.mean(0), new_B.mean(0)
        turned[:, a.part] = new_A.reshape(len(thetas), -1).to(thetas)
        turned[:, b.part] = new_B.reshape(len(thetas), -1).to(thetas)
    return turned
