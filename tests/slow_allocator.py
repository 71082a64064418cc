"""The allocator's rules written down a second time, from end to end and without a thought of speed."""

from itertools import pairwise

MiB = 1 << 20


class Plain:
    """Plain segments without speed: each a list of pieces [address, bytes, in use], read from end to end."""

    def __init__(self, capacity: int) -> None:
        self.segments: list[tuple[int, bool, list[list[int]]]] = []
        self.capacity, self.peak, self.retries = capacity, 0, 0

    def reserved(self) -> int:
        return sum(piece[1] for _, _, pieces in self.segments for piece in pieces)

    def allocated(self) -> int:
        return sum(piece[1] for _, _, pieces in self.segments for piece in pieces if piece[2])

    def malloc(self, n_bytes: int, stream: int) -> tuple[int, int] | None:
        need = -(-max(n_bytes, 1) // 512) * 512
        small = need <= MiB
        size = 2 * MiB if small else 20 * MiB if need < 10 * MiB else -(-need // (2 * MiB)) * 2 * MiB
        for attempt in range(3):
            fits = [
                (piece[1], piece[0])
                for of, is_small, pieces in self.segments
                if (of, is_small) == (stream, small)
                for piece in pieces
                if not piece[2] and piece[1] >= need
            ]
            if fits:
                return self.cut(min(fits)[1], need, small)
            if attempt == 1:
                self.retries += 1
                self.segments = [s for s in self.segments if any(piece[2] for piece in s[2])]
            if self.reserved() + size <= self.capacity:
                lowest = min((pieces[0][0] for _, _, pieces in self.segments), default=1 << 47)
                self.segments.append((stream, small, [[lowest - size, size, 0]]))
                self.peak = max(self.peak, self.reserved())
        return None

    def cut(self, address: int, need: int, small: bool) -> tuple[int, int]:
        for _, _, pieces in self.segments:
            for at, piece in enumerate(pieces):
                if piece[0] == address:
                    rest = piece[1] - need
                    if (rest >= 512) if small else (rest > MiB):
                        pieces[at : at + 1] = [[address, need, 1], [address + need, rest, 0]]
                    else:
                        piece[2] = 1
                    return address, pieces[at][1]
        raise AssertionError(address)

    def free(self, address: int) -> None:
        for _, _, pieces in self.segments:
            for piece in pieces:
                if piece[0] == address:
                    piece[2] = 0
            for at in range(len(pieces) - 1, 0, -1):
                if not pieces[at][2] and not pieces[at - 1][2]:
                    pieces[at - 1][1] += pieces.pop(at)[1]


class Pages:
    """Expandable segments without speed: one range, the set of mapped pages, and the pieces in use."""

    def __init__(self, page: int) -> None:
        self.page, self.mapped, self.used = page, set[int](), dict[int, int]()

    def reserved(self) -> int:
        return len(self.mapped) * self.page

    def gaps(self, pages: set[int]) -> list[tuple[int, int]]:
        """Stretches [start, end) of `pages` that are not in use, by address."""
        edges = sorted(
            {edge for page in pages for edge in (page * self.page, (page + 1) * self.page)}
            | {edge for start, size in self.used.items() for edge in (start, start + size)}
        )
        found: list[tuple[int, int]] = []
        for low, high in pairwise(edges):
            in_use = any(start <= low < start + size for start, size in self.used.items())
            if low // self.page in pages and not in_use:
                joined = found and found[-1][1] == low
                found[-1:] = [(found[-1][0], high)] if joined else [*found[-1:], (low, high)]
        return found

    def room(self, gap: tuple[int, int]) -> int:
        """Bytes of a gap and of the unmapped pages behind it: without end after the last mapped one."""
        page = last = gap[1] // self.page
        if gap[1] % self.page or page in self.mapped:
            return gap[1] - gap[0]
        while page in range(max(self.mapped) + 1) and page not in self.mapped:
            page += 1
        return gap[1] - gap[0] + ((page - last) * self.page if page <= max(self.mapped) else 1 << 60)

    def malloc(self, n_bytes: int) -> int:
        need = -(-n_bytes // 512) * 512
        fits = sorted((end - start, start, end) for start, end in self.gaps(self.mapped) if end - start >= need)
        best = 0
        while best + 1 < len(fits) and self.room(fits[best + 1][1:]) < self.room(fits[best][1:]):
            best += 1
        if fits:
            start = fits[best][1]
        else:
            horizon = max(self.mapped, default=-1) + 2 + need // self.page
            every = set(range(horizon + 1))
            unmapped = sorted(every - self.mapped)
            runs = [gap for gap in self.gaps(every) if gap[1] - gap[0] >= need]
            start = next(s for s, e in runs if any(s <= page * self.page < e for page in unmapped))
            self.mapped |= set(range(start // self.page, -(-(start + need) // self.page)))
        self.used[start] = need
        return start

    def release(self) -> None:
        for start, end in self.gaps(self.mapped):
            self.mapped -= set(range(-(-start // self.page), end // self.page))
