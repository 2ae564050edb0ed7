"""Episodes of several seeds side by side: a GIF, an mp4 or a window.

Each seed has a tile with its number and its return so far. When its episode has ended, the tile
shows the last frame, faded. The film runs in real time, at the environment's render_fps.
"""

import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from lab.errors import UserError

RATE = 25  # approximate frames/s; browsers slow down a GIF with more than 50
COLOURS = 128  # GIF palette; 255 makes files a quarter larger, 64 loses the colours of the bodies
PAUSE = 0.7  # seconds on the last frame of an episode
COLUMNS = 4  # most tiles in a row
GAP, MARGIN = 6, 4  # pixels: around a tile, around its caption
WHITE, GREY, BLACK = (255, 255, 255), (232, 232, 232), (0, 0, 0)


class Output(Protocol):
    def show(self, frame: Image.Image, seconds: float) -> None: ...

    def close(self) -> None: ...


class Film:
    """Composes the frames of episodes. `seconds`: limit per episode; None: no limit."""

    def __init__(self, output: Output, seeds: Sequence[int], fps: float, width: int,
                 seconds: float | None):
        self.output, self.seeds, self.width = output, seeds, width
        self.every = max(1, round(fps / RATE))  # steps per frame
        self.length = self.every / fps  # of a frame, seconds
        self.limit = math.inf if seconds is None else max(1, seconds * fps)  # steps per episode
        self.font: Any = ImageFont.load_default(max(8, width // 16))
        self.seconds = 0.0  # length of the film so far
        self.cut = False  # whether an episode was longer than the limit

    def episode(self, draw: Callable[[int, bool], np.ndarray], title: str = ""
                ) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """-> on_step(returns (S, 1), running (S, 1)), to be called before the first step and after
        each step. draw(index, running) -> (height, width, 3) uint8."""
        tiles = [Image.new("RGB", (1, 1))] * len(self.seeds)
        alive, steps = [True] * len(self.seeds), itertools.count()

        def on_step(returns: torch.Tensor, running: torch.Tensor) -> None:
            step, now = next(steps), running[:, 0].tolist()  # synchronises
            if step > self.limit or not any(alive):
                return
            cut = step + 1 > self.limit and any(now)
            self.cut |= cut
            end = cut or not any(now)
            due = step % self.every == 0 or end
            for i, seed in enumerate(self.seeds):
                if alive[i] and (due or not now[i]):
                    captions = f"seed {seed}{title}", f"{returns[i, 0].item():.1f}"
                    tiles[i] = self._tile(draw(i, now[i]), captions, now[i])
            alive[:] = now
            if due:
                seconds = self.length + PAUSE * end
                self.output.show(mosaic(tiles), seconds)
                self.seconds += seconds

        return on_step

    def _tile(self, frame: np.ndarray, captions: tuple[str, str], running: bool) -> Image.Image:
        height = round(self.width * frame.shape[0] / frame.shape[1])
        scene = Image.fromarray(frame).resize((self.width, height), Image.Resampling.BOX)
        if not running:
            scene = Image.blend(scene, Image.new("RGB", scene.size, WHITE), 0.5)
        caption = sum(self.font.getmetrics()) + 2 * MARGIN
        tile = Image.new("RGB", (self.width, caption + height), GREY)
        tile.paste(scene, (0, caption))
        pen = ImageDraw.Draw(tile)
        pen.text((MARGIN, MARGIN), captions[0], BLACK, self.font)
        pen.text((self.width - MARGIN, MARGIN), captions[1], BLACK, self.font, anchor="ra")
        return tile


def mosaic(tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles in rows of equal length. Width and height are even, as mp4 requires."""
    rows = math.ceil(len(tiles) / COLUMNS)
    columns = math.ceil(len(tiles) / rows)
    width, height = (side + GAP for side in tiles[0].size)
    size = [side + GAP + (side + GAP) % 2 for side in (columns * width, rows * height)]
    canvas = Image.new("RGB", (size[0], size[1]), WHITE)
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (GAP + i % columns * width, GAP + i // columns * height))
    return canvas


def open_output(out: Path | None) -> Output:
    """A file, or for None a window. UserError if it cannot be opened here."""
    if out is None:
        return Window()
    if out.suffix not in (".gif", ".mp4"):
        raise UserError(f"--out {out}: the name must end in .gif or .mp4")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write {out}: choose another place with --out")
    return Gif(out) if out.suffix == ".gif" else Video(out)


class Gif:
    """One palette for the whole film and no dithering: nothing flickers, and little changes between
    frames, so the file is small."""

    def __init__(self, path: Path):
        self.path = path
        self.frames: list[bytes] = []  # PNG; uncompressed, minutes of film would take gigabytes
        self.ends = [0.0]  # of the frames, seconds

    def show(self, frame: Image.Image, seconds: float) -> None:
        content = io.BytesIO()
        frame.save(content, "PNG", compress_level=1)
        self.frames.append(content.getvalue())
        self.ends.append(self.ends[-1] + seconds)

    def close(self) -> None:
        if not self.frames:
            return
        chosen = self.frames[:: math.ceil(len(self.frames) / 16)]
        pixels = np.concatenate([np.asarray(_open(content)).reshape(-1, 3) for content in chosen])
        colours = _distinct(pixels)  # count rare colours more, or small bodies turn grey
        sample = np.concatenate([pixels, np.tile(colours, (len(pixels) // len(colours) // 6, 1))])
        palette = Image.fromarray(sample[None]).quantize(COLOURS)
        first, *others = (_open(content).quantize(palette=palette, dither=Image.Dither.NONE)
                          for content in self.frames)
        ends = [10 * round(100 * end) for end in self.ends]  # GIF times are multiples of 10 ms
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        first.save(self.path, save_all=True, append_images=others, duration=lengths, loop=0,
                   optimize=True)


def _distinct(pixels: np.ndarray) -> np.ndarray:
    """np.unique(pixels, axis=0) of (n, 3) uint8; on packed integers it is 30 times faster."""
    red, green, blue = pixels.T.astype(np.int32)
    codes = np.unique(red << 16 | green << 8 | blue)
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).astype(np.uint8)


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


class Video:
    """An mp4 that every browser plays."""

    def __init__(self, path: Path):
        try:
            import imageio_ffmpeg
        except ImportError as error:
            raise UserError(f"--out {path}: an mp4 needs a package: pip install imageio-ffmpeg"
                            ) from error
        self.write, self.path = imageio_ffmpeg.write_frames, path.absolute()
        self.file: Any = None

    def show(self, frame: Image.Image, seconds: float) -> None:
        if self.file is None:  # the first frame has the normal length, without PAUSE
            self.length = seconds
            self.file = self.write(str(self.path), frame.size, fps=1 / seconds,
                                   macro_block_size=2, ffmpeg_log_level="error")
            self.file.send(None)
        for _ in range(round(seconds / self.length)):
            self.file.send(frame.tobytes())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class Closed(Exception):
    """The user closed the window."""


class Window:
    def __init__(self) -> None:
        displays = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
        if sys.platform == "linux" and not any(map(os.environ.get, displays)):
            raise UserError("--window: there is no display here; leave it out for a GIF")
        import pygame  # comes with gymnasium[box2d]

        self.pygame, self.clock = pygame, pygame.time.Clock()
        try:
            pygame.display.init()
            pygame.display.set_caption("lab.watch")
        except pygame.error as error:
            raise UserError(f"--window: {error}; leave it out for a GIF") from error

    def show(self, frame: Image.Image, seconds: float) -> None:
        screen = self.pygame.display.get_surface()
        if screen is None or screen.get_size() != frame.size:
            screen = self.pygame.display.set_mode(frame.size)
        screen.blit(self.pygame.image.frombytes(frame.tobytes(), frame.size, "RGB"), (0, 0))
        self.pygame.display.flip()
        if self.pygame.event.get(self.pygame.QUIT):
            raise Closed
        self.clock.tick(1 / seconds)

    def close(self) -> None:
        self.pygame.display.quit()
