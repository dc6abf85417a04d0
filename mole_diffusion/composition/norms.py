"""How large the output of every LoRA is, without making it."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..experts import ExpertStack, Projections, Site, SiteGroup
from ..experts.uncast import uncast

_ROOTS: WeakKeyDictionary[ExpertStack | SiteGroup, Tensor] = WeakKeyDictionary()


def sizes_at(site: Site, like: Tensor) -> Callable[[Projections], Tensor]:
    """What reads the size of every LoRA's output at every token off products, but for one number for each LoRA.

    Args:
        site: The module.
        like: A tensor on the device and in the dtype of its products.

    Returns:
        Projections to `(n, batch, tokens)`, float32, for the n LoRAs that touch the module; to `(modules, n, batch,
        tokens)` of all modules that read the same tensor, where the same LoRAs touch them with one rank.
    """
    stack, name, number, kind = site.stack, site.name, len(site.stack.indices), like.device.type
    rank, wide = stack.rank // number, like.dtype == torch.float64
    alike = site.group.several and site.group.alike and not stack.is_convolution
    root = of_all = None
    if not stack.orthonormal:
        root, of_all = root_like(stack, like), roots_like(site.group, like) if alike else None
    turned: dict[int, Tensor] = {}  # R of all samples, for a convolution

    def linear(projections: Projections) -> Tensor:
        whole, batch, tokens = projections.whole if alike else None, projections.batch, projections.tokens
        z, roots = (projections.rows[name], root) if whole is None else (whole, of_all)
        z = z.view(batch * tokens, -1, rank)
        if roots is not None:
            with uncast(kind):
                z = torch.bmm(z.float().transpose(0, 1), roots)
            sizes = torch.linalg.vector_norm(z, dim=-1)
        else:  # of rows as they lie; a norm would not narrow them
            sizes = torch.linalg.vector_norm(z.float() if wide else z, dim=-1, dtype=torch.float32).t()
        return sizes.view(number, batch, tokens) if whole is None else sizes.view(-1, number, batch, tokens)

    def convolution(projections: Projections) -> Tensor:
        batch = projections.batch
        z = projections.rows[name].float().reshape(batch * number, rank, -1)
        if root is None:
            squares = z.square()
        else:
            if batch not in turned:
                turned[batch] = root.transpose(1, 2).repeat(batch, 1, 1)
            with uncast(kind):
                z = torch.bmm(turned[batch], z)
            squares = z.square_()
        # Along tokens, one after another in memory, a sum is several times as fast as a norm.
        return squares.sum(dim=1).sqrt_().view(batch, number, -1).transpose(0, 1)

    def whole(projections: Projections) -> Tensor:
        with uncast(kind):
            return whole_norms(site, projections)

    if not stack.same_rank or site.beside is not None:
        return whole
    return convolution if stack.is_convolution else linear


def output_norms(stack: ExpertStack, projected: Tensor) -> Tensor:
    """Size of every LoRA's output at every token, `|E_i(x)|`, from its r coordinates.

    With `s_i B_i = Q_i R_i` and orthonormal columns of Q, `|s_i B_i z| = |R_i z|`, so the outputs are never made.

    Args:
        stack: The LoRAs at a module.
        projected: z = down x, `(batch * tokens, R)`, or `(batch, R, tokens)` of a convolution.

    Returns:
        `(n, batch * tokens)`, or `(n, batch, tokens)`, float32, for the n LoRAs that touch the module.
    """
    root, z, number = root_like(stack, projected), projected.float(), len(stack.indices)
    if root.ndim == 2:  # LoRAs of several ranks
        z = z.transpose(1, 2) if stack.is_convolution else z
        coordinates = (z @ root).unflatten(-1, (number, root.shape[1] // max(number, 1)))
        return torch.linalg.vector_norm(coordinates, dim=-1).movedim(-1, 0)
    if not stack.is_convolution:
        coordinates = torch.bmm(z.view(z.shape[0], number, -1).transpose(0, 1), root)
        return torch.linalg.vector_norm(coordinates, dim=-1)
    # One product for each LoRA instead of a large one that is mostly zeros.
    coordinates = torch.matmul(z.view(len(z), *root.shape[:2], z.shape[2]).transpose(2, 3), root)
    return torch.linalg.vector_norm(coordinates, dim=-1).transpose(0, 1)


def whole_norms(site: Site, projections: Projections) -> Tensor:
    """`output_norms` also of LoRAs that add more than a product of small rank, whose outputs are made.

    Returns:
        `(n, batch, tokens)`.
    """
    norms = output_norms(site.stack, projections.rows[site.name])
    norms = norms.reshape(norms.shape[0], projections.batch, projections.tokens)
    if site.beside is None or projections.base is None:
        return norms
    projected = projections.tensors[site.name].float()
    up, owner = (x.to(projected.device) for x in (site.stack.up_as(torch.float32), site.stack.expert_of_rank))
    terms = site.beside.outputs(projections.hidden_states, projections.base, site.stack.indices)
    for index, term in terms.items():
        place = site.stack.indices.index(index)
        if not site.stack.rank:  # a norm, which gives more features than its weight has where it is one for all heads
            norms[place] = term.float().norm(dim=-1)
            continue
        its = owner == index
        norms[place] = (projected[..., its] @ up[:, its].T + term.float()).norm(dim=-1)
    return norms


def root_like(stack: ExpertStack, like: Tensor) -> Tensor:
    """R of each LoRA that touches the module, as z is multiplied by it, where a tensor lies.

    Returns:
        `(n, r, r)` where all have one rank, float32. Else R of each in columns of its own, all as many,
        `(sum of the ranks, n * columns)`, zero elsewhere.
    """
    root = _ROOTS.get(stack)
    if root is None or root.device != like.device:
        _ROOTS[stack] = root = _root(stack).to(like.device)
    return root


def roots_like(group: SiteGroup, like: Tensor) -> Tensor:
    """`root_like` of all modules of a group, one after another, `(modules * n, r, r)`."""
    roots = _ROOTS.get(group)
    if roots is None or roots.device != like.device:
        _ROOTS[group] = roots = torch.cat([root_like(site.stack, like) for site in group.sites])
    return roots


def _root(stack: ExpertStack) -> Tensor:
    """As `root_like`."""
    ups = stack.up_as(torch.float32).split([stack.ranks[expert] for expert in stack.indices], dim=1)
    triangles = [torch.linalg.qr(up, mode="r").R.t() for up in ups]
    if triangles and len({triangle.shape for triangle in triangles}) == 1:
        return torch.stack(triangles)
    columns = max([1, *(triangle.shape[1] for triangle in triangles)])
    root, row = torch.zeros(sum(stack.ranks), len(triangles), columns), 0
    for place, triangle in enumerate(triangles):
        root[row : row + len(triangle), place, : triangle.shape[1]] = triangle
        row += len(triangle)
    return root.flatten(1)
