"""How large the output of every LoRA is, without making it."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..experts import ExpertStack, Projections, Site, SiteGroup

_ROOTS: WeakKeyDictionary[ExpertStack, Tensor] = WeakKeyDictionary()
_ROOTS_OF_GROUPS: WeakKeyDictionary[SiteGroup, Tensor | None] = WeakKeyDictionary()


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
        return _norms(root, z)
    # One product for each LoRA instead of a large one that is mostly zeros.
    coordinates = torch.matmul(z.view(len(z), *root.shape[:2], z.shape[2]).transpose(2, 3), root)
    return torch.linalg.vector_norm(coordinates, dim=-1).transpose(0, 1)


def group_norms(site: Site, projections: Projections) -> Tensor | None:
    """`output_norms` of all modules that read the same tensor, in one go.

    Returns:
        `(modules, n, batch, tokens)`; `None` where the module reads it alone, or where not the same LoRAs touch all of
        them with one rank.
    """
    if projections.whole is None:
        return None
    group, whole = site.group, projections.whole
    root = _ROOTS_OF_GROUPS.get(group)
    if root is None and group not in _ROOTS_OF_GROUPS:
        _ROOTS_OF_GROUPS[group] = root = _root_of_group(group, whole)
    if root is None:
        return None
    if root.device != whole.device:
        _ROOTS_OF_GROUPS[group] = root = root.to(whole.device)
    return _norms(root, whole.float()).view(len(group.sites), -1, projections.batch, projections.tokens)


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


def _norms(root: Tensor, z: Tensor) -> Tensor:
    """`(n, batch * tokens)` of `(n, r, r)` and `(batch * tokens, n * r)`."""
    number, rank, _ = root.shape
    coordinates = torch.bmm(z.view(z.shape[0], number, rank).transpose(0, 1), root)
    return torch.linalg.vector_norm(coordinates, dim=-1)


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


def _root_of_group(group: SiteGroup, like: Tensor) -> Tensor | None:
    stacks = [site.stack for site in group.sites]
    roots = [root_like(stack, like) for stack in stacks]
    alike = len({(stack.indices, root.shape) for stack, root in zip(stacks, roots, strict=True)}) == 1
    if not alike or roots[0].ndim != 3 or any(site.beside is not None for site in group.sites):
        return None
    return torch.cat(roots)
