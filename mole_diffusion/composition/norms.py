"""How large the output of every LoRA is, without making it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..experts import ExpertStack, Projections, Site, SiteGroup
from ..experts.uncast import uncast

_ROOTS: WeakKeyDictionary[ExpertStack | SiteGroup, Tensor] = WeakKeyDictionary()


def relative_sizes(site: Site, projections: Projections) -> Tensor:
    """Size of every LoRA's output at every token, but for one number for each LoRA and module.

    Returns:
        `(batch, tokens, modules, n)`, float32, for the n LoRAs that touch the module: of all modules that read the same
        tensor where the same LoRAs touch them with one rank; else of this one.
    """
    stack, rows, batch = site.stack, projections.rows[site.name], projections.batch
    if not stack.same_rank or site.beside is not None:
        with uncast(rows.device):
            return whole_norms(site, projections).permute(1, 2, 0)[:, :, None]
    number, rank = len(stack.indices), stack.rank // len(stack.indices)
    if stack.is_convolution:  # along tokens, one after another in memory, a sum is several times as fast as a norm
        z = rows.float().view(batch, number, rank, -1)
        if not stack.orthonormal:
            with uncast(z.device):
                z = torch.matmul(root_like(stack, z).transpose(1, 2), z)
        return z.square().sum(dim=2).sqrt_().transpose(1, 2)[:, :, None]
    whole = projections.whole if site.group.alike else None
    z = (rows if whole is None else whole).view(batch * projections.tokens, -1, rank)
    if not stack.orthonormal:
        with uncast(z.device):
            roots = root_like(stack, z) if whole is None else _roots_like(site.group, z)
            z = torch.bmm(z.float().transpose(0, 1), roots).transpose(0, 1)
    z = z.float() if z.dtype == torch.float64 else z  # which a norm would not narrow
    sizes = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32)
    return sizes.view(batch, projections.tokens, -1, number)


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


def _roots_like(group: SiteGroup, like: Tensor) -> Tensor:
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
