"""What a block pool must do, written down without any structure that makes it fast."""

from __future__ import annotations

__all__ = ["BlockModel"]


class BlockModel:
    """Blocks as lists: users, content, and when each was last used."""

    def __init__(self, num_blocks: int) -> None:
        self.users = [0] * num_blocks
        self.content: list[bytes | None] = [None] * num_blocks
        self.freed_at = [0] * num_blocks
        self.clock = 0

    @property
    def num_free(self) -> int:
        return self.users.count(0)

    def match(self, hashes: list[bytes]) -> list[int]:
        found = []
        for one in hashes:
            if one not in self.content:
                break
            found.append(self.content.index(one))
        return found

    def can_take(self, shared: list[int], num_new: int) -> bool:
        return sum(self.users[block] == 0 and block not in shared for block in range(len(self.users))) >= num_new

    def take(self, shared: list[int], new: list[int]) -> None:
        """Take the blocks the pool chose; they must be among those worth least."""
        for block in shared:
            self.users[block] += 1
        for block in new:
            free = [one for one, users in enumerate(self.users) if users == 0]
            empty = [one for one in free if self.content[one] is None]
            oldest = min(free, key=lambda one: self.freed_at[one])
            assert block in empty if empty else block == oldest
            self.users[block], self.content[block] = 1, None

    def register(self, block: int, content: bytes) -> None:
        if content not in self.content and self.content[block] is None:
            self.content[block] = content

    def free(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            self.clock += 1
            self.freed_at[block] = self.clock
