"""From many channels to one: their mean, except where they cancel each other.

A microphone with reversed wires, or one channel inverted by an editor, makes the mean of two channels silent, although
each of them can be heard. Travels with the checkpoint.
"""

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 1.0  # in which cancellation is judged; shorter words than that are part of a longer window
# The mean of N unrelated channels has the sum of their energies, divided by N * N. Channels that have a tenth of it
# left, 10 dB less, are each other's inverse: their correlation is below -0.8.
LEFT = 0.1
MIN_LEVEL = 1e-4  # root mean square, -80 dBFS: less is the noise of converters


class Mixer:
    """Mixes the blocks of one recording.

    Attributes:
        num_cancelled: windows in which channels cancelled each other so far.
    """

    def __init__(self) -> None:
        self.num_cancelled = 0

    def mix(self, block: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
        """Return the mean of the channels of a block, (n, channels) to (n,).

        Where they cancel each other, those that are the inverse of the first audible one are inverted first.
        """
        num_channels = block.shape[1]
        if num_channels == 1:
            return np.ascontiguousarray(block[:, 0])
        with np.errstate(invalid="ignore", over="ignore"):  # the caller reports values that are not finite
            if num_channels == 2:
                mean = (block[:, 0] + block[:, 1]) / np.float32(2)
            else:
                mean = block.mean(axis=1, dtype=np.float32)
            size = max(int(rate * WINDOW_S), 1)
            for begin in range(0, len(block), size):
                window, mixed = block[begin : begin + size], mean[begin : begin + size]
                energy = float(np.vdot(window, window))
                if not energy > MIN_LEVEL**2 * len(window):  # false for NaN
                    continue
                if float(np.vdot(mixed, mixed)) < LEFT * energy / num_channels**2:
                    mean[begin : begin + size] = _aligned(window).mean(axis=1, dtype=np.float32)
                    self.num_cancelled += 1
        return np.asarray(mean, dtype=np.float32)


def _aligned(window: NDArray[np.float32]) -> NDArray[np.float32]:
    """Invert the channels that are the inverse of the first audible one."""
    energies = np.einsum("nc,nc->c", window, window)
    first = int(np.flatnonzero(energies >= 0.1 * energies.max())[0])
    signs = np.where(window.T @ window[:, first] < 0, -1, 1).astype(np.float32)
    return window * signs
