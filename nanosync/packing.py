"""Packed documents: sequences that hold any number of documents, for attention that does not cross documents.

Every token but the last token of a file is an input with a target. A file is cut into sequences of at most T
such inputs, and each epoch serves each input once. A row of T inputs ends with the last input of its
sequence. The inputs before the sequence are context: their targets are -1. So a sequence that begins inside a
document still sees the tokens before it.

The cuts are a grid with a spacing of T - slack, slack = T // 32. A cut moves forward to the first document
start within `slack` tokens, if there is a document start. Then the sequence begins with a document. A cut
depends on slack + 1 tokens of the file only, and the number of sequences on the length of the file only.
Nothing else is read to find a sequence.

The place of the grid is random in every epoch, as is the order of the sequences, see WindowOrder.

B = sequences of a micro-batch, T = block_size.
"""

import numpy as np

from nanosync.dataloader import Split, WindowOrder
from nanosync.token_files import FORMATS


class Grid:
    """The grid on which a file is cut into sequences.

    A grid with offset o cuts before the inputs o, o + spacing, o + 2 * spacing, ... The number of cuts is the
    same for all offsets. All sequences have about T / 4 inputs or more, because the mean loss of a few
    targets would be noise. A file of up to T inputs is one sequence.
    """

    def __init__(self, n_tokens: int, T: int):
        """Choose the number of cuts and the range of offsets for a file of n_tokens tokens."""
        self.inputs, self.slack = n_tokens - 1, T // 32
        self.spacing = T - self.slack
        self.cuts, self.offsets = 0, (0, 0)  # offsets: least, largest
        if self.inputs > T:
            cuts = (self.inputs - 1) // self.spacing
            ranges = [(n, self._offsets(n, T)) for n in (cuts, cuts + 1)]
            self.cuts, self.offsets = max(ranges, key=lambda found: found[1][1] - found[1][0])

    def _offsets(self, cuts: int, T: int) -> tuple[int, int]:
        """Return the least and the largest offset for which no sequence is too long or too short."""
        shortest = max(1, self.spacing // 4)
        rest = self.inputs - (cuts - 1) * self.spacing  # inputs of the first and the last sequence
        return max(shortest, rest - T), min(self.spacing, rest - shortest)

    @property
    def sequences(self) -> int:
        return self.cuts + 1 if self.inputs > 0 else 0

    def cut(self, tokens: np.ndarray, end_of_text: int | None, number: int, offset: int) -> int:
        """Return the first input of sequence `number`; for number = sequences, the end of the inputs."""
        if number == 0:
            return 0
        if number > self.cuts:
            return self.inputs
        place = offset + (number - 1) * self.spacing
        if end_of_text is None:
            return place
        starts = np.flatnonzero(tokens[place:min(place + self.slack + 1, self.inputs)] == end_of_text)
        return place + int(starts[0]) if len(starts) else place


class PackedSplit(Split):
    """A split of which training reads packed sequences. Its windows for evaluation are those of a Split."""

    shortest = 2  # tokens of a file that has a sequence

    def count(self, n_tokens: int) -> int:
        return Grid(n_tokens, self.block_size).sequences

    def order(self, seed: int) -> "PackedOrder":
        return PackedOrder(self, seed)

    def gather(self, places: np.ndarray) -> np.ndarray:
        """Read windows (n, T + 1), see Split.gather. After the end of a file shorter than a window, tokens
        are end-of-text, or 0 if the tokenizer has no end-of-text."""
        out = np.full((len(places), self.block_size + 1), self.end_of_text or 0, self.dtype)
        for row, (file, start) in zip(out, places[:, :2]):
            part = self.files[file][start:start + self.block_size + 1]
            row[:len(part)] = part
        return out

    def hide_context(self, targets, places: np.ndarray) -> None:
        for row, (begin, end) in zip(targets, (places[:, 2:] - places[:, 1:2]).tolist()):
            row[:begin] = -1
            row[end:] = -1


class PackedOrder(WindowOrder):
    """Order of the sequences: a pure function of (seed, epoch, number in the epoch) and of tokens near cuts.

    Its places are (file, first token of the row, first input of the sequence, end of the sequence).
    """

    columns = 4

    def _inside(self, epoch: int, file: int, numbers: np.ndarray) -> np.ndarray:
        tokens, end_of_text = self.split.files[file], self.split.end_of_text
        grid, offset, order = self._grid(epoch, file)
        sequences = order[numbers]
        first, end = ([grid.cut(tokens, end_of_text, int(n) + i, offset) for n in sequences] for i in (0, 1))
        return np.stack((np.maximum(np.array(end) - self.split.block_size, 0), first, end), axis=1)

    def _grid(self, epoch: int, file: int) -> tuple[Grid, int, np.ndarray]:
        """Return a file's grid, its offset, and the order of its sequences in an epoch."""
        if file not in self._starts:
            grid = Grid(len(self.split.files[file]), self.split.block_size)
            offset, order = grid.offsets[1], np.arange(grid.sequences)
            if not FORMATS[self.split.kind].ordered or epoch > 0:
                random = self._random(epoch, 1 + file)
                order, offset = random.permutation(order), random.randint(grid.offsets[0], offset + 1)
            self._starts = {file: (grid, offset, order)}  # keep only the file in use
        return self._starts[file]
