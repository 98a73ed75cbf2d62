"""Packs short samples into groups of fixed shape, best fit by tokens and images; millions of records take seconds.

    one group, N = 2 image slots, R = 2 rows of T tokens: records a and b, three questions each
    slots   [a][b]
    row 0   [a2......][a0....][b1....]     longest first, each into the fullest row that has room
    row 1   [b0.........][b2....][a1..]

The order of records is cut into lanes, which numpy fills side by side, one record per lane and step.
"""

from typing import NamedTuple

import numpy as np

LOOKAHEAD = 64  # records that the open group chooses from; few beside an epoch, so the order stays random
LANE = 2048  # minimum records in a lane
MAX_LANES = 4096
_NEVER = np.float32(1e30)  # tokens of a missing record: they fit no group


class GroupShape(NamedTuple):
    """Describes the shape of a group: N image slots (`images`), R rows (`rows`) of T tokens (`length`)."""

    images: int
    rows: int
    length: int


class Lengths(NamedTuple):
    """Holds the lengths of the segments of n records.

    Attributes:
      first: int [n + 1]; the segments of record i are `tokens[first[i]:first[i + 1]]`.
      tokens: int32, length of every segment in tokens, each record's longest first.
    """

    first: np.ndarray
    tokens: np.ndarray

    def padded(self, records: np.ndarray) -> np.ndarray:
        """Returns the segment lengths of K records, int32 [K, S], padded with 0."""
        first, counts = self.first[records], self.first[records + 1] - self.first[records]
        columns = np.arange(counts.max(initial=0))
        at = np.minimum(first[:, None] + columns, max(len(self.tokens) - 1, 0))
        return np.where(columns < counts[:, None], self.tokens[at], 0).astype(np.int32)


def place(room: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places segments into rows, each into the fullest row that has room.

    Args:
      room: int32 [K, R], tokens left in each row of K groups; updated in place.
      lengths: int32 [K, S], segments of one record for each group, longest first; 0 = no segment.

    Returns:
      The row of each segment, int [K, S], and whether all segments of a group found room, bool [K]; where they did
      not, the group's `room` is no longer valid.
    """
    groups = np.arange(len(room))
    rows, fits = np.zeros(lengths.shape, int), np.ones(len(room), bool)
    for s in range(lengths.shape[1]):
        rest = room - lengths[:, s : s + 1]
        rest[rest < 0] = np.iinfo(np.int32).max
        rows[:, s] = rest.argmin(1)
        fits &= rest[groups, rows[:, s]] < np.iinfo(np.int32).max
        room[groups, rows[:, s]] -= lengths[:, s]
    return rows, fits


def fits_alone(slots: np.ndarray, lengths: Lengths, shape: GroupShape) -> np.ndarray:
    """Returns whether each record fits an empty group, bool [n]."""
    totals = _totals(lengths)
    fits = (slots <= shape.images) & (totals <= shape.rows * shape.length)
    if shape.rows > 1:
        for start in range(0, len(slots), 1 << 16):
            records = np.arange(start, min(start + (1 << 16), len(slots)))
            room = np.full((len(records), shape.rows), shape.length, np.int32)
            fits[records] &= place(room, lengths.padded(records))[1]
    return fits


def _totals(lengths: Lengths) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(lengths.tokens, dtype=np.int64)])
    return sums[lengths.first[1:]] - sums[lengths.first[:-1]]


def fill_groups(
    slots: np.ndarray, lengths: Lengths, shape: GroupShape, lookahead: int = LOOKAHEAD
) -> tuple[np.ndarray, np.ndarray]:
    """Fills groups with records, taken in order; each record must fit an empty group.

    Of the next `lookahead` records, the open group takes the one that fits best: the largest dot product of the room
    left in the group and the need of the record, over tokens and image slots. If none fits, the group is closed.
    `lookahead=1` keeps the order.

    Args:
      slots: int [n], image slots of each record.
      lengths: segments of each record.
      shape: shape of the groups.
      lookahead: number of records to choose from.

    Returns:
      order: int32 [n], records in the order of their groups.
      first: int [groups + 1]; group g holds `order[first[g]:first[g + 1]]`.
    """
    count = len(slots)
    if not count:
        return np.zeros(0, np.int32), np.zeros(1, np.int64)
    lanes = 1 if lookahead == 1 else min(max(count // LANE, 1), MAX_LANES)
    size = -(-count // lanes)
    starts = np.arange(0, count, size)
    ends = np.minimum(starts + size, count)
    lanes, lane, rows = len(starts), np.arange(len(starts)), shape.rows > 1
    tokens, images = _totals(lengths).astype(np.float32), slots.astype(np.float32)
    # The state of each lane: records to choose from, room left in the open group, records placed.
    window = starts[:, None] + np.arange(min(lookahead, size))
    valid = window < ends[:, None]
    window = np.where(valid, window, starts[:, None])
    need_tokens, need_images = np.where(valid, tokens[window], _NEVER), images[window]
    upcoming = starts + window.shape[1]
    total = np.float32(shape.rows * shape.length)
    left_tokens, left_images = np.full(lanes, total), np.full(lanes, np.float32(shape.images))
    room = np.full((lanes, shape.rows), shape.length, np.int32)
    blocked = np.zeros(window.shape, bool)  # records that fit by their total tokens, but not row by row
    order, group = np.empty(count, np.int32), np.empty(count, np.int32)
    placed, groups = starts.copy(), np.zeros(lanes, np.int32)
    weight_tokens, weight_images = 1 / total**2, 1 / np.float32(max(shape.images, 1)) ** 2
    while (placed < ends).any():
        score = need_tokens * (left_tokens * weight_tokens)[:, None]
        score += need_images * (left_images * weight_images)[:, None]
        score += np.float32(1e-6)  # a record that needs nothing still scores above 0
        score[(need_tokens > left_tokens[:, None]) | (need_images > left_images[:, None]) | blocked] = 0
        best = score.argmax(1)
        found = score[lane, best] > 0
        closed = lane[~found]
        groups[closed] += 1
        left_tokens[closed], left_images[closed] = total, shape.images
        room[closed], blocked[closed] = shape.length, False
        a, b = lane[found], best[found]
        if rows:
            trial = room[a]
            fits = place(trial, lengths.padded(window[a, b]))[1]
            blocked[a[~fits], b[~fits]] = True
            a, b = a[fits], b[fits]
            room[a] = trial[fits]
        order[placed[a]], group[placed[a]] = window[a, b], groups[a]
        placed[a] += 1
        left_tokens[a] -= need_tokens[a, b]
        left_images[a] -= need_images[a, b]
        more = upcoming[a] < ends[a]
        following = np.minimum(upcoming[a], count - 1)
        window[a, b] = following
        need_tokens[a, b], need_images[a, b] = np.where(more, tokens[following], _NEVER), images[following]
        blocked[a, b] = False
        upcoming[a] += 1
    new = np.ones(count, bool)
    new[1:] = group[1:] != group[:-1]
    new[starts] = True
    return order, np.append(np.flatnonzero(new), count)
