"""Write the bundled clip: a red ball crosses a room while a blue box rises. ``python -m bench.make_clip OUT.mp4``."""

import sys

import av
import numpy as np

HEIGHT, WIDTH, FPS, SECONDS = 240, 320, 25, 4


def frame(progress: float) -> np.ndarray:
    """The picture at ``progress`` in 0..1."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    picture = np.empty((HEIGHT, WIDTH, 3))
    picture[:] = (214, 206, 190)
    picture[rows > 180] = (140, 110, 82)
    picture *= (1.05 - 0.15 * rows / HEIGHT)[..., None]
    top = 150 - 110 * progress
    picture[(rows >= top) & (rows < top + 48) & (columns >= 236) & (columns < 284)] = (40, 76, 180)
    x, y, radius = 30 + 170 * progress, 158 - 40 * abs(np.sin(3 * np.pi * progress)), 24
    distance = np.hypot(rows - y, columns - x)
    light = 1.15 - 0.5 * np.hypot(rows - y + 8, columns - x + 8) / radius
    ball = np.array((205, 42, 38)) * light[..., None]
    inside = np.clip(radius - distance, 0, 1)[..., None]
    return np.clip(picture * (1 - inside) + ball * inside, 0, 255).astype(np.uint8)


def main(path: str) -> None:
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FPS * SECONDS):
            picture = frame(index / (FPS * SECONDS - 1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


if __name__ == "__main__":
    main(sys.argv[1])
