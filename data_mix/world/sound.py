"""What a clip sounds like: struck and rolling things as sums of decaying modes over a quiet room."""

import functools

import numpy as np

from data_mix.world.scene import FPS, Event, Scene, Thing
from mm.common.seeds import rng

RATE = 24_000  # samples a second, stereo

# Modes as ratios to the lowest, decay in seconds, brightness: free bars, plates, glasses, damped lumps.
_MODES = {
    "wood": ((1.0, 2.57, 4.9, 7.3), 0.07, 0.5, 330.0),
    "metal": ((1.0, 2.76, 5.4, 8.93, 11.3), 0.55, 0.8, 520.0),
    "glass": ((1.0, 2.32, 4.25, 6.63), 0.30, 0.7, 1250.0),
    "rubber": ((1.0, 1.5, 2.2), 0.09, 0.25, 120.0),
}
_SHAPE_PITCH = {"ball": 1.0, "cube": 0.89, "cone": 1.12, "star": 1.26, "ring": 1.5, "cross": 0.79}


@functools.cache
def _strike(material: str, shape: str, pitch_step: int) -> np.ndarray:
    """float32 [samples]: one unit blow on a thing; `pitch_step` in quarter octaves (small things ring higher)."""
    ratios, decay, bright, base = _MODES[material]
    low = base * _SHAPE_PITCH[shape] * 2 ** (pitch_step / 4)
    t = np.arange(int(RATE * min(6 * decay, 1.2)), dtype=np.float32) / RATE
    out = np.zeros_like(t)
    for k, ratio in enumerate(ratios):
        if low * ratio < RATE * 0.45:
            out += bright**k * np.exp(-t / (decay / (1 + 0.4 * k))) * np.sin(2 * np.pi * low * ratio * t)
    out[: RATE // 1000] *= np.linspace(0, 1, RATE // 1000, dtype=np.float32)
    return out / np.abs(out).max()


@functools.cache
def _hiss(seconds_ms: int) -> np.ndarray:
    """Fixed noise that rolling and the room are cut from."""
    return rng(0, "hiss").standard_normal(RATE * seconds_ms // 1000).astype(np.float32)


@functools.cache
def _room() -> np.ndarray:
    """Quiet, dull noise of unit strength."""
    out = np.convolve(_hiss(6000), np.hanning(24), "same").astype(np.float32)
    return out / out.std()


def _pitch(thing: Thing) -> int:
    return 3 if thing.size == "small" else 0


def _roll(thing: Thing, n: int, shift: int) -> np.ndarray:
    """Friction: the strike of the thing under fine irregular taps, i.e. noise through its modes."""
    body = _strike(thing.material, thing.shape, _pitch(thing))[: RATE // 12]
    noise = np.roll(_hiss(6000), shift)[: n + len(body)]
    size = 1 << int(n + len(body) - 1).bit_length()
    out = np.fft.irfft(np.fft.rfft(noise, size) * np.fft.rfft(body, size), size)[:n].astype(np.float32)
    return out / (np.abs(out).max() + 1e-6)


def _sweep(n: int, start: float, stop: float) -> np.ndarray:
    f = np.linspace(start, stop, n, dtype=np.float32)
    return np.sin(2 * np.pi * np.cumsum(f) / RATE)


def pan_of(x: float, width: int) -> float:
    """-1 (left edge) .. 1 (right edge)."""
    return float(np.clip(2 * x / width - 1, -1, 1))


def _mix(out: np.ndarray, mono: np.ndarray, start: float, pan: np.ndarray | float, gain: float) -> None:
    i = int(start * RATE)
    mono = mono[: out.shape[1] - i]
    angle = (np.asarray(pan)[..., : len(mono)] + 1) * (np.pi / 4) if np.ndim(pan) else (pan + 1) * (np.pi / 4)
    out[0, i : i + len(mono)] += gain * np.cos(angle) * mono
    out[1, i : i + len(mono)] += gain * np.sin(angle) * mono


def _path(thing: Thing, t0: float, n: int, width: int) -> np.ndarray:
    """Pan at each of n samples from t0."""
    frame = (t0 + np.arange(n) / RATE) * FPS
    x = np.interp(frame, np.arange(len(thing.tracks[0].x)), thing.tracks[0].x)
    return np.clip(2 * x / width - 1, -1, 1).astype(np.float32)


def _fade(mono: np.ndarray, seconds: float = 0.04) -> np.ndarray:
    k = min(int(seconds * RATE), len(mono) // 2)
    mono[:k] *= np.linspace(0, 1, k, dtype=np.float32)
    mono[-k:] *= np.linspace(1, 0, k, dtype=np.float32)
    return mono


def _travel(out: np.ndarray, thing: Thing, event: Event, width: int, shift: int) -> dict:
    """The drawn-out part: rolling for slides, a rising or falling whistle for what flies."""
    n = int((event.t1 - event.t0) * RATE)
    x, y = thing.tracks[0].x, thing.tracks[0].y
    speed = float(np.hypot(np.ptp(x), np.ptp(y)) / (event.t1 - event.t0) / 100)
    gain = float(np.clip(0.1 + 0.12 * speed, 0.1, 0.3))
    if event.motion.startswith("slides"):
        mono, kind = _roll(thing, n, shift), "roll"
    else:
        up = event.motion == "rises"
        mono, kind = _sweep(n, 300, 900) if up else _sweep(n, 900, 300), "rise" if up else "fall"
        gain *= 0.5
    pan = _path(thing, event.t0, n, width)
    _mix(out, _fade(mono), event.t0, pan, gain)
    return {"t": event.t0, "kind": kind, "thing": event.thing, "pan": float(pan[: n // 4].mean()), "gain": gain}


def _blows(out: np.ndarray, thing: Thing, event: Event, width: int) -> list[dict]:
    rows = []
    for k, t in enumerate(event.hits):
        frame = min(int(t * FPS), len(thing.tracks[0].x) - 1)
        pan = pan_of(float(np.mean([p.x[frame] for p in thing.tracks])), width)
        gain = (0.75 if thing.size == "large" else 0.5) * 0.85**k
        _mix(out, _strike(thing.material, thing.shape, _pitch(thing)), t, pan, gain)
        if event.motion == "splits":
            _mix(out, _fade(_hiss(6000)[: RATE // 16].copy(), 0.002), t, pan, 0.12)
        kind = "split" if event.motion == "splits" else "impact"
        rows.append({"t": t, "kind": kind, "thing": event.thing, "pan": pan, "gain": gain})
    return rows


def _vanish(out: np.ndarray, thing: Thing, event: Event, width: int) -> dict:
    n = int(0.35 * RATE)
    pan = pan_of(float(thing.tracks[0].x[0]), width)
    puff = _hiss(6000)[RATE : RATE + n] * np.exp(-np.arange(n, dtype=np.float32) / (0.08 * RATE)) * 0.25
    chirp = _sweep(n, 1500, 250) * np.linspace(1, 0, n, dtype=np.float32) ** 2
    _mix(out, _fade(0.5 * chirp + puff, 0.004), event.t0, pan, 0.5)
    return {"t": event.t0, "kind": "vanish", "thing": event.thing, "pan": pan, "gain": 0.5}


def soundtrack(scene: Scene, random: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
    """The sound of a clip and its truth.

    Returns: (float32 [2, samples] within [-1, 1] at RATE; rows {t: onset in seconds, kind, thing, pan -1..1, gain}
    in the order of t).
    """
    n = int(scene.seconds * RATE)
    shift = int(random.integers(RATE))
    room = np.roll(_room(), shift)[:n]
    out = np.stack([room, np.roll(room, 37)]).astype(np.float32) * float(random.uniform(0.001, 0.004))
    truth: list[dict] = []
    for event in scene.events:
        thing = scene.things[event.thing]
        if event.motion == "vanishes":
            truth.append(_vanish(out, thing, event, scene.width))
        elif event.motion != "splits":
            if event.motion != "bounces":
                truth.append(_travel(out, thing, event, scene.width, shift))
            truth += _blows(out, thing, event, scene.width)
        else:
            truth += _blows(out, thing, event, scene.width)
    for row in truth:
        row.update({k: round(row[k], 3) for k in ("t", "pan", "gain")})
    return np.clip(out, -1, 1), sorted(truth, key=lambda r: r["t"])
