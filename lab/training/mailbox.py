"""The actor through which jobs on a Ray cluster send their messages. No torch: it stays small."""

import asyncio
from typing import Any


class Mailbox:
    """Messages in the order in which they were put, each with the key of its job."""

    def __init__(self) -> None:
        self.letters: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def put(self, key: int, message: Any) -> None:
        await self.letters.put((key, message))

    async def take(self) -> list[tuple[int, Any]]:
        """All that have come, at least one: wait for it."""
        taken = [await self.letters.get()]
        while not self.letters.empty():
            taken.append(self.letters.get_nowait())
        return taken
