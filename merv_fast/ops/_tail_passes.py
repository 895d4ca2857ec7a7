"""The passes of pool_project_fuse over tokens and matrices in PyTorch; all but matrix_gradients have kernels too."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_outer", "blend", "dots", "matrix_gradients", "score_vectors"]


def score_vectors(P: list[Tensor], query: Tensor) -> list[Tensor]:
    """``a_e = P_e^T query``, in the dtype sums are made in."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return [query.to(dtype) @ P_e.to(dtype) for P_e in P]


def dots(grads: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``(<G_e, V_e> [B, E], mean_s(V_e) side by side [B, sum D_e])`` per video, in the dtype sums are made in."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    dw = [(G.to(dtype) * V).sum((1, 2)) for G, V in zip(grads, values, strict=True)]
    return torch.stack(dw, 1), torch.cat([V.mean(1, dtype=dtype) for V in values], 1)


def matrix_gradients(
    G: Tensor, P: list[Tensor], values: list[Tensor], w: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`dots` of ``G P_e`` and the values, and the matrices' gradients ``sum_b w_be R_be`` but for what scores add.

    ``R_be = G_b^T V_be``, made video after video, serves both, as ``<G P_e, V_e> = <P_e, R_e>``.
    """
    dw, sums = torch.empty_like(w), []
    for e, (P_e, V) in enumerate(zip(P, values, strict=True)):
        total = w.new_zeros(P_e.shape)
        for video in range(G.shape[0]):
            R = (G[video].T @ V[video]).to(w.dtype)
            dw[video, e] = (R * P_e).sum()
            total.addcmul_(R, w[video, e])
        sums.append(total.to(P_e.dtype))
    return dw, torch.cat([V.mean(1, dtype=w.dtype) for V in values], 1), sums


def add_outer(grads: list[Tensor], P: list[Tensor], query: Tensor, means: list[Tensor]) -> Tensor:
    """Add ``query m_e^T`` to ``grads[e] [D, C_e]``, and return ``sum_e P_e m_e``."""
    q = query.to(means[0].dtype)
    for grad, mean in zip(grads, means, strict=True):
        torch.addr(grad, q, mean, out=grad)
    return torch.stack([P_e.to(q.dtype) @ mean for P_e, mean in zip(P, means, strict=True)]).sum(0)


def blend(
    w: Tensor,
    *,
    grads: Sequence[Tensor] = (),
    ds: Tensor | None = None,
    vectors: Sequence[Tensor] = (),
    dvalues: Sequence[Tensor] = (),
    values: Sequence[Tensor] = (),
    weighed: Sequence[Tensor] = (),
) -> None:
    """Write ``dvalues[e] = w_e G_e + ds_e vectors[e] / S``, and ``weighed[e] = w_e V_e``; in place, if asked to."""
    for e, (out, G, vector) in enumerate(zip(dvalues, grads, vectors, strict=True)):
        assert ds is not None
        out.copy_(w[:, e, None, None] * G + ds[:, e, None, None] * (vector / G.shape[1]))
    for e, (out, V) in enumerate(zip(weighed, values, strict=True)):
        out.copy_(w[:, e, None, None] * V)
