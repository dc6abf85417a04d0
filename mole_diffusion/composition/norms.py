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
    root, number = _root_like(stack, projected), len(stack.indices)
    z = projected.float()
    if root.ndim == 3 and not stack.is_convolution:
        return _norms(root, z)
    if root.ndim == 3:  # one product for each LoRA instead of a large one that is mostly zeros
        coordinates = root @ z.unflatten(-2, (number, root.shape[-1]))
    else:
        rows = len(root) // max(number, 1)
        coordinates = (root @ (z if stack.is_convolution else z.t())).unflatten(-2, (number, rows))
    norms = coordinates.square_().sum(dim=-2).sqrt_()
    return norms.movedim(1, 0) if stack.is_convolution else norms


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
    norms = norms.reshape(len(norms), projections.batch, projections.tokens)
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
    """`(n, batch * tokens)` of `(n, r, r)` and `(batch * tokens, n * r)`: what follows runs along the longer axis."""
    number, _, rank = root.shape
    return torch.bmm(root, z.view(len(z), number, rank).permute(1, 2, 0)).square_().sum(dim=1).sqrt_()


def _root_like(stack: ExpertStack, like: Tensor) -> Tensor:
    root = _ROOTS.get(stack)
    if root is None or root.device != like.device:
        _ROOTS[stack] = root = _root(stack).to(like.device)
    return root


def _root(stack: ExpertStack) -> Tensor:
    """R of each LoRA that touches the module: `(n, r, r)` where all have one rank.

    Else R of each in rows of its own, all as many, `(n * rows, sum of the ranks)`, zero elsewhere.
    """
    ups = stack.up_as(torch.float32).split([stack.ranks[expert] for expert in stack.indices], dim=1)
    triangles = [torch.linalg.qr(up, mode="r").R for up in ups]
    if triangles and len({triangle.shape for triangle in triangles}) == 1:
        return torch.stack(triangles)
    rows = max([1, *map(len, triangles)])
    root, column = torch.zeros(len(triangles), rows, sum(stack.ranks)), 0
    for place, triangle in enumerate(triangles):
        root[place, : len(triangle), column : column + triangle.shape[1]] = triangle
        column += triangle.shape[1]
    return root.flatten(0, 1)


def _root_of_group(group: SiteGroup, like: Tensor) -> Tensor | None:
    stacks = [site.stack for site in group.sites]
    roots = [_root_like(stack, like) for stack in stacks]
    alike = len({(stack.indices, root.shape) for stack, root in zip(stacks, roots, strict=True)}) == 1
    if not alike or roots[0].ndim != 3 or any(site.beside is not None for site in group.sites):
        return None
    return torch.cat(roots)
