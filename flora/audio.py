"""Clips of any kind as what a speech model hears: mono float32 samples at 16 kHz."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from flora.engine.runner import SILENCE
from flora.errors import AudioError

SAMPLING_RATE = 16_000  # Hz, what Whisper listens to
LONGEST_CLIP_S = 600.0  # what load_audio reads at most when no window is given
FFMPEG_TIMEOUT_S = 20
# Containers that hold their sound themselves. A playlist (HLS, concat) is not among them: it could name other files of
# this machine.
FFMPEG_FORMATS = "mov,matroska,mp3,aac,ogg,wav,flac,amr,asf,avi,aiff,caf,au,ac3,w64,mpegts,mpeg,flv"


def load_audio(
    source: str | os.PathLike | bytes, window_s: float | None = None, name: str | None = None
) -> tuple[np.ndarray, int]:
    """Read a clip as mono float32 samples (n,) at 16 kHz, and return them with that rate.

    source: a file, or a file's content as bytes, as data sets hold it. Anything that libsndfile reads (WAV, FLAC, Ogg,
    MP3, …), else what ffmpeg reads (M4A, WebM, …). Channels are averaged; a peak above full scale is brought down to it.
    window_s: the longest clip allowed, in seconds. name: what errors call it, by default the file's name.

    Raises AudioError, naming the clip: not audio, corrupt, empty, silent, samples that are no numbers, too long.
    """
    import soundfile  # only here: a machine that measures speed may have neither
    import soxr

    name = name or ("without a name" if isinstance(source, bytes) else Path(source).name)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise AudioError(f"there is no clip {name!r}: give the name of a sound file that exists")
    if (len(source) if isinstance(source, bytes) else Path(source).stat().st_size) == 0:
        raise AudioError(f"the clip {name!r} is an empty file: record or upload it again")
    longest_s = LONGEST_CLIP_S if window_s is None else window_s
    try:
        clip = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except soundfile.LibsndfileError:
        samples, sampling_rate = _read_with_ffmpeg(source, name, longest_s), SAMPLING_RATE  # (n,)
    else:
        sampling_rate = clip.samplerate
        with clip:
            _refuse_too_long(name, clip.frames / sampling_rate, longest_s)
            try:
                samples = clip.read(dtype="float32", always_2d=True).mean(axis=1)  # (n,)
            except soundfile.LibsndfileError as error:
                raise AudioError(f"the clip {name!r} is corrupt: record or export it again") from error
    if not len(samples):
        raise AudioError(f"the clip {name!r} holds no sound at all: record or export it again")
    if not np.isfinite(samples).all():
        raise AudioError(f"the clip {name!r} has samples that are not finite numbers: export it again")
    if np.abs(samples - samples.mean()).max() < SILENCE:
        raise AudioError(f"the clip {name!r} is silent: check the microphone or choose another clip")
    if sampling_rate != SAMPLING_RATE:
        samples = soxr.resample(samples, sampling_rate, SAMPLING_RATE)
    _refuse_too_long(name, len(samples) / SAMPLING_RATE, longest_s)
    samples = samples / max(1.0, float(np.abs(samples).max()))
    return np.ascontiguousarray(samples, dtype=np.float32), SAMPLING_RATE


def _refuse_too_long(name: str, seconds: float, longest_s: float) -> None:
    if seconds > longest_s:
        raise AudioError(f"the clip {name!r} lasts {seconds:.1f} s, longer than the {longest_s:g} s allowed: cut it shorter")


def _read_with_ffmpeg(source: str | os.PathLike | bytes, name: str, longest_s: float) -> np.ndarray:
    """Mono float32 samples (n,) at 16 kHz of a clip that libsndfile does not know; a little more than the window, to
    see that it is too long.
    """
    if isinstance(source, bytes):  # some containers have their index at the end: a pipe could not be read
        with tempfile.NamedTemporaryFile() as file:
            file.write(source)
            file.flush()
            return _read_with_ffmpeg(file.name, name, longest_s)
    command = [
        "ffmpeg",
        "-nostdin",
        "-v",
        "error",
        "-xerror",
        "-protocol_whitelist",
        "file",
        "-format_whitelist",
        FFMPEG_FORMATS,
    ]
    command += ["-i", f"file:{Path(source).resolve()}", "-map", "a:0", "-vn", "-sn", "-dn", "-t", f"{longest_s + 1:.3f}"]
    command += ["-ac", "1", "-ar", str(SAMPLING_RATE), "-f", "f32le", "pipe:1"]
    try:
        run = subprocess.run(command, capture_output=True, timeout=FFMPEG_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise AudioError(f"the clip {name!r} cannot be read here without ffmpeg: save it as WAV, FLAC or MP3") from error
    except subprocess.TimeoutExpired as error:
        raise AudioError(f"the clip {name!r} takes too long to decode: save it as WAV, FLAC or MP3") from error
    if run.returncode:
        raise AudioError(f"the file {name!r} is not audio, or is corrupt: choose a sound file such as WAV, FLAC, MP3 or M4A")
    samples = np.frombuffer(run.stdout, dtype="<f4")  # (n,)
    if len(samples) > (longest_s + 0.5) * SAMPLING_RATE:
        raise AudioError(f"the clip {name!r} is longer than the {longest_s:g} s allowed: cut it shorter")
    return samples
