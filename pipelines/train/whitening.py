"""Let a projector start from whitened features: the store's mean and standard deviation, folded into its first layer.

Only a store can know them exactly before the first step. The folded layer is the same plain Linear, so the saved model
and the loader of checkpoints know nothing of it:

    W ((x - mean) / std) + b  =  (W / std) x  +  (b - (W / std) mean)
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cache import FeatureReader, feature_moments
from pipelines.errors import RunError
from pipelines.train.derived import remembered
from tinyaudio.model.projectors import Projector


def feature_statistics(
    reader: FeatureReader, say: Callable[[str], None] = print
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute mean and standard deviation per dimension over all frames of a split: (D,) each, std positive.

    That reads the whole split, over an hour for 2,500 hours of speech, so it is done once for a store.
    """

    def work_out() -> dict[str, NDArray[np.float32]]:
        calibration = feature_moments(reader).calibration()  # its std is positive where a dimension never moves
        return {"mean": calibration.mean, "std": calibration.std}

    found = remembered(reader.store, "mean-and-deviation", {"split": reader.split, "moments": 1}, work_out, say)
    return found["mean"], found["std"]


@torch.no_grad()
def fold_whitening(projector: Projector, mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
    """Change a fresh projector so that it does to features what it did to whitened ones.

    Frames of a short last stack are zero as they are, not zero after whitening; what that adds is learnt away.

    Args:
        mean, std: (D,), std positive.

    Raises:
        RunError: no Linear reads the frames as they are.
    """
    layer = projector.first_linear()
    if layer is None:
        raise RunError(
            f"projector.whiten cannot be folded into {type(projector).__name__}, whose first layer is not a Linear on "
            "raw frames; expected projector.kind mlp or linear, or whiten = false"
        )
    scale, shift = (torch.from_numpy(np.tile(values, projector.stack_factor)) for values in (std, mean))
    layer.weight /= scale.to(layer.weight)
    layer.bias.sub_(layer.weight @ shift.to(layer.weight))
