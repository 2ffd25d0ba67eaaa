"""`block-influence`: how far a block turns the residual stream; the block that turns it least goes first.

Source: ShortGPT (arXiv 2403.03853), BI_i = 1 - mean cos(x_i, x_i+1) over tokens. With allocator `contiguous` the run
through which the stream turns least by cosine goes, as in LLM-Streamline (arXiv 2403.19135).
"""

from torch import Tensor

from secateur.criteria.base import GroupView, block_criterion


@block_criterion("block-influence")
def block_influence(view: GroupView) -> Tensor:
    """[U + 1, U + 1]: 1 - mean cosine of the stream at two places."""
    sums, places = view.stream()
    return 1 - sums.cosine[places][:, places] / sums.count
