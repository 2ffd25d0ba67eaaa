"""`uniform`: the same share of every group."""

from secateur.allocation.base import Problem, allocator, check_reachable, largest_within, nearest


@allocator("uniform", blind=True, blocks=True)
def uniform(problem: Problem) -> dict[str, int]:
    """Counts nearest to one common share, the largest share that meets the target."""
    check_reachable(problem)
    allowed = {g.name: problem.allowed(g) for g in problem.groups}
    sizes = {g.name: g.size for g in problem.groups}

    def at(share: float) -> dict[str, int]:
        return {n: nearest(a, share * sizes[n]) for n, a in allowed.items()}

    return largest_within(problem, at)
