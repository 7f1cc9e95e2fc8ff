"""The spoken corpus: number and command phrases read by espeak-ng, in six languages and English.

What is said is made here: two to four digits, or a command ("open the door"), with or without a number after it ("open
the door five"). What is written is lower-case, without punctuation, in the language's own script, normalised to NFC. A
clip is 16 kHz mono float32 in [-1, 1], at most `WINDOW_S` long, so that it fits the embedded speech model's window.

The held-out split keeps away from training in three ways at once: its voices, its speeds and pitches, and its word
combinations (a fifth of all of them, by a hash of the text) are in no training clip. Only the bare commands, a closed
list, are in both splits.

espeak-ng has no Mongolian voice: Mongolian Cyrillic is read by the Kazakh one, the nearest it has, which knows
every letter. Arabic is read from text with vowel marks, which the transcript, as usual in Arabic, leaves out.

    python -m flora.corpus.speech --dataset runs/speech     # clips to train on and to be judged by
    python -m flora.corpus.speech --clips assets/clips      # the examples that ship: held-out clips of every language
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr

from flora.errors import ModelError

SAMPLING_RATE = 16_000
WINDOW_S = 4.0
SPLITS = ("train", "held-out")

VARIANTS = {"train": ("m1", "m2", "m3", "m4", "m5", "m8", "f1", "f2", "f4"), "held-out": ("m6", "m7", "f3")}
SPEEDS = {"train": (110, 120, 130, 140, 150, 160, 170, 180), "held-out": (115, 135, 155, 175)}  # words per minute
PITCHES = {"train": (30, 40, 50, 60, 70), "held-out": (35, 45, 55, 65)}  # espeak's scale, 0 to 99

EXAMPLES_PER_LANGUAGE = {"en": 2}
"""Example clips that ship, where it is not four: English is no adapter's language."""

VOWEL_MARKS = re.compile("[\u064b-\u0652]")  # Arabic: spoken, not written


@dataclass(frozen=True)
class SpokenLanguage:
    """What is said in one language, and by which espeak-ng voice.

    A command is a verb and an object, in the order of the language (`object_first`), or one of `phrases`. note: what a
    card of a model or adapter of this language has to say about its speech, a sentence or nothing.
    """

    name: str
    voice: str
    digits: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    phrases: tuple[str, ...]
    object_first: bool = False
    note: str = ""

    def commands(self) -> list[str]:
        """Every bare command: verbs with objects, then the fixed phrases."""
        pairs = [(verb, thing) for verb in self.verbs for thing in self.objects]
        return [f"{b} {a}" if self.object_first else f"{a} {b}" for a, b in pairs] + list(self.phrases)


def _words(text: str) -> tuple[str, ...]:
    """A comma-separated list as a tuple, NFC."""
    return tuple(unicodedata.normalize("NFC", word.strip()) for word in text.split(","))


LANGUAGES: dict[str, SpokenLanguage] = {
    "ar": SpokenLanguage(
        "Arabic",
        "ar",
        _words("صِفْر, وَاحِد, اِثْنَان, ثَلَاثَة, أَرْبَعَة, خَمْسَة, سِتَّة, سَبْعَة, ثَمَانِيَة, تِسْعَة"),
        _words("اِفْتَحْ, أَغْلِقْ, أَرِنِي"),
        _words("البَاب, النَّافِذَة, الكِتَاب, الصُّنْدُوق"),
        _words("قِفْ هُنَا, اِتَّجِهْ يَسَارًا, اِتَّجِهْ يَمِينًا, عُدْ إلى البَيْت"),
    ),
    "cs": SpokenLanguage(
        "Czech",
        "cs",
        _words("nula, jedna, dva, tři, čtyři, pět, šest, sedm, osm, devět"),
        _words("otevři, zavři, ukaž"),
        _words("dveře, okno, knihu, krabici"),
        _words("zůstaň stát, zahni doleva, zahni doprava, jdi domů"),
    ),
    "lt": SpokenLanguage(
        "Lithuanian",
        "lt",
        _words("nulis, vienas, du, trys, keturi, penki, šeši, septyni, aštuoni, devyni"),
        _words("atidaryk, uždaryk, parodyk"),
        _words("duris, langą, knygą, dėžę"),
        _words("sustok čia, suk kairėn, suk dešinėn, eik namo"),
    ),
    "mr": SpokenLanguage(
        "Marathi",
        "mr",
        _words("शून्य, एक, दोन, तीन, चार, पाच, सहा, सात, आठ, नऊ"),
        _words("उघडा, बंद करा, दाखवा"),
        _words("दार, खिडकी, पुस्तक, पेटी"),
        _words("इथे थांबा, डावीकडे वळा, उजवीकडे वळा, घरी जा"),
        object_first=True,
    ),
    "mn": SpokenLanguage(
        "Mongolian",
        "kk",
        _words("тэг, нэг, хоёр, гурав, дөрөв, тав, зургаа, долоо, найм, ес"),
        _words("нээ, хаа, үзүүл"),
        _words("хаалга, цонх, ном, хайрцаг"),
        _words("энд зогс, зүүн тийш эргэ, баруун тийш эргэ, гэртээ харь"),
        object_first=True,
        note="espeak-ng has no Mongolian voice: its Kazakh one, the nearest that knows every letter, reads the Mongolian text.",
    ),
    "hi": SpokenLanguage(
        "Hindi",
        "hi",
        _words("शून्य, एक, दो, तीन, चार, पाँच, छह, सात, आठ, नौ"),
        _words("खोलो, बंद करो, दिखाओ"),
        _words("दरवाज़ा, खिड़की, किताब, डिब्बा"),
        _words("यहाँ रुको, बाएँ मुड़ो, दाएँ मुड़ो, घर जाओ"),
        object_first=True,
    ),
    "en": SpokenLanguage(
        "English",
        "en-us",
        _words("zero, one, two, three, four, five, six, seven, eight, nine"),
        _words("open, close, show, find, bring, take"),
        _words("the door, the window, the book, the box, the light, the table, the key, the picture"),
        _words("stop here, turn left, turn right, go home, come back, start again, wait for me, listen to this"),
    ),
}


@dataclass(frozen=True)
class Utterance:
    """One clip before it is spoken; `speak` makes the same samples of it every time."""

    tag: str  # language
    text: str  # the transcript
    spoken: str  # what espeak-ng reads: the transcript, with vowel marks where the language has them
    voice: str  # espeak-ng voice and variant, such as "cs+m3"
    speed: int  # words per minute
    pitch: int  # 0 to 99
    peak: float  # the largest sample, 0 to 1
    noise_db: float  # white noise below the speech's power
    lead_s: float  # silence before the first word
    seed: int  # of the noise


def written(spoken: str) -> str:
    """The transcript of what espeak-ng is given to read: the same without Arabic vowel marks."""
    return VOWEL_MARKS.sub("", spoken)


def is_held_out(text: str) -> bool:
    """Whether a word combination belongs to the held-out split: a fifth do, by a hash of the transcript."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def _phrase(language: SpokenLanguage, split: str, choice: random.Random) -> str:
    """A phrase to speak: digits (60 %), a bare command (20 %), or a command and a number (20 %).

    The kind is drawn first, then a phrase of it until one belongs to the split: both splits hold the same mixture.
    """
    kind = choice.random()
    while True:
        if kind < 0.6:
            phrase = " ".join(choice.choice(language.digits) for _ in range(choice.randint(2, 4)))
        else:
            phrase = choice.choice(language.commands())
            if kind < 0.8:
                return phrase
            phrase += " " + choice.choice(language.digits)
        if is_held_out(written(phrase)) == (split == "held-out"):
            return phrase


def utterances(tag: str, split: str = "train", seed: int = 0) -> Iterator[Utterance]:
    """An endless stream of utterances of one language and split, the same for the same arguments.

    Raises:
        ValueError: an unknown tag or split.
    """
    if tag not in LANGUAGES or split not in SPLITS:
        known = f"tags are {', '.join(LANGUAGES)}, splits {', '.join(SPLITS)}"
        raise ValueError(f"there is no spoken corpus '{tag}' / '{split}': {known}")
    language, choice = LANGUAGES[tag], random.Random(f"{tag} {split} {seed}")
    while True:
        spoken = _phrase(language, split, choice)
        yield Utterance(
            tag=tag,
            text=written(spoken),
            spoken=spoken,
            voice=f"{language.voice}+{choice.choice(VARIANTS[split])}",
            speed=choice.choice(SPEEDS[split]),
            pitch=choice.choice(PITCHES[split]),
            peak=round(choice.uniform(0.2, 0.95), 3),
            noise_db=round(choice.uniform(30.0, 50.0), 1),
            lead_s=round(choice.uniform(0.05, 0.3), 3),
            seed=choice.randrange(2**31),
        )


def require_espeak() -> str:
    """The path of espeak-ng.

    Raises:
        ModelError: it is not installed.
    """
    path = shutil.which("espeak-ng")
    if path is None:
        raise ModelError(
            "espeak-ng, which speaks the corpus, is not installed: apt install espeak-ng, or brew install espeak-ng"
        )
    return path


@lru_cache
def _voices(espeak: str) -> frozenset[str]:
    """The voices espeak-ng has; asked for one it lacks, it would read with another one and say nothing."""
    listing = subprocess.run([espeak, "--voices"], capture_output=True, text=True, check=False).stdout
    return frozenset(line.split()[1] for line in listing.splitlines()[1:] if line.strip())


def speak(utterance: Utterance) -> np.ndarray:
    """The clip: float32 samples (n,) at 16 kHz, mono, trimmed to `lead_s` of silence before the words and 0.1 s after.

    Raises:
        ModelError: espeak-ng is not installed, or does not know the voice.
    """
    espeak = require_espeak()
    if utterance.voice.split("+")[0] not in _voices(espeak):
        raise ModelError(
            f"espeak-ng has no voice '{utterance.voice}': reinstall it with its data, or choose another language"
        )
    options = ["-v", utterance.voice, "-s", str(utterance.speed), "-p", str(utterance.pitch), "--stdout"]
    done = subprocess.run([espeak, *options], input=utterance.spoken.encode(), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        message = done.stderr.decode(errors="replace").strip()
        raise ModelError(f"espeak-ng cannot read with the voice '{utterance.voice}': {message}")
    # espeak-ng leaves the length fields of a streamed WAV at their largest value; soundfile reads to the end.
    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)
    speech = soxr.resample(samples.mean(axis=1), rate, SAMPLING_RATE)
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1] + 1]
    lead = np.zeros(round(utterance.lead_s * SAMPLING_RATE), dtype=np.float32)
    clip = np.concatenate([lead, speech, np.zeros(SAMPLING_RATE // 10, dtype=np.float32)])
    clip *= utterance.peak / np.abs(clip).max()
    speech_power = np.mean(np.square(speech * (utterance.peak / np.abs(speech).max())))
    noise_power = speech_power * 10.0 ** (-utterance.noise_db / 10.0)
    noise = np.random.default_rng(utterance.seed).standard_normal(len(clip), dtype=np.float32)
    return np.clip(clip + noise * np.float32(np.sqrt(noise_power)), -1.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Clips:
    """Spoken clips of one language and split, read from a cached file."""

    tag: str
    split: str
    samples: np.ndarray  # (total,) int16, the clips one after another
    offsets: np.ndarray  # (n + 1,) int64: clip i is samples[offsets[i]:offsets[i + 1]]
    texts: list[str]  # n transcripts
    voices: list[str]  # n

    def __len__(self) -> int:
        return len(self.texts)

    def audio(self, index: int) -> np.ndarray:
        """Clip `index`: float32 (n,) at 16 kHz."""
        return self.samples[self.offsets[index] : self.offsets[index + 1]].astype(np.float32) / 32768.0


def _clips_path(folder: str | Path, tag: str, split: str, count: int, seed: int) -> Path:
    return Path(folder) / f"{tag}-{split}-{count}-{seed}.npz"


def _make_clips(folder: str | Path, tag: str, split: str, count: int, seed: int) -> Path:
    """Speak `count` clips that fit the window into one .npz file, unless it is there; whole or not at all."""
    path = _clips_path(folder, tag, split, count, seed)
    if path.exists():
        return path
    clips, spoken = [], []
    for utterance in utterances(tag, split, seed):
        clip = speak(utterance)
        if len(clip) <= WINDOW_S * SAMPLING_RATE:
            clips.append(np.round(clip * 32767.0).astype(np.int16))
            spoken.append(utterance)
        if len(clips) == count:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            samples=np.concatenate(clips),
            offsets=np.cumsum([0, *(len(clip) for clip in clips)]),
            texts=np.array([utterance.text for utterance in spoken]),
            voices=np.array([utterance.voice for utterance in spoken]),
        )
    os.replace(partial, path)
    return path


def load_clips(folder: str | Path, tag: str, split: str, count: int, seed: int = 0) -> Clips:
    """`count` clips of one language and split, from the cache in `folder`; spoken first if they are not there.

    Raises:
        ModelError: the clips must be spoken and espeak-ng is not installed.
    """
    with np.load(_make_clips(folder, tag, split, count, seed), allow_pickle=False) as stored:
        texts, voices = stored["texts"].tolist(), stored["voices"].tolist()
        return Clips(tag, split, stored["samples"], stored["offsets"], texts, voices)


def build_dataset(
    folder: str | Path, counts: Mapping[tuple[str, str], int], *, seed: int = 0, processes: int = 2
) -> dict[tuple[str, str], Clips]:
    """Speak and cache clips, a file per language and split, in parallel; `counts` maps (tag, split) to their number.

    What is there already is kept: a second call only reads.

    Raises:
        ModelError: something must be spoken and espeak-ng is not installed.
    """
    missing = [key for key, count in counts.items() if not _clips_path(folder, *key, count, seed).exists()]
    if missing:
        require_espeak()
        with ProcessPoolExecutor(processes) as pool:
            made = [pool.submit(_make_clips, folder, tag, split, counts[tag, split], seed) for tag, split in missing]
            for future in made:
                future.result()
    return {(tag, split): load_clips(folder, tag, split, count, seed) for (tag, split), count in counts.items()}


def write_example_clips(folder: str | Path, seed: int = 1) -> list[dict[str, str]]:
    """The examples that ship: held-out clips, numbers and commands in turn, as FLAC, with clips.json beside them.

    The clips of a language take turns through the held-out voices. Returns the list that clips.json holds:
    {file, tag, text, voice}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for tag, language in LANGUAGES.items():
        digits = {written(digit) for digit in language.digits}
        heard = dict.fromkeys((f"{language.voice}+{variant}" for variant in VARIANTS["held-out"]), 0)
        for index in range(EXAMPLES_PER_LANGUAGE.get(tag, 4)):
            for utterance in utterances(tag, "held-out", seed + index):
                words = utterance.text.split()
                numbers_only = len(words) == 3 and set(words) <= digits
                command_and_number = words[-1] in digits and not digits & set(words[:-1])
                wanted = numbers_only if index % 2 == 0 else command_and_number
                if wanted and heard[utterance.voice] == min(heard.values()):
                    break
            heard[utterance.voice] += 1
            name = f"{tag}_{index + 1}.flac"
            soundfile.write(folder / name, speak(utterance), SAMPLING_RATE, subtype="PCM_16")
            entries.append({"file": name, "tag": tag, "text": utterance.text, "voice": utterance.voice})
    (folder / "clips.json").write_text(json.dumps(entries, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return entries


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints what was made."""
    parser = argparse.ArgumentParser(
        prog="python -m flora.corpus.speech", description="Speak the corpus with espeak-ng."
    )
    parser.add_argument("--clips", metavar="FOLDER", help="write the example clips that ship, and clips.json")
    parser.add_argument("--dataset", metavar="FOLDER", help="speak and cache training and held-out clips")
    parser.add_argument(
        "--tags", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES), help="languages of the dataset"
    )
    parser.add_argument("--train-count", type=int, default=2000, help="training clips per language")
    parser.add_argument("--held-out-count", type=int, default=100, help="held-out clips per language")
    parser.add_argument(
        "--list", metavar="TAG", choices=list(LANGUAGES), help="print twenty held-out transcripts of a language"
    )
    options = parser.parse_args(arguments)
    if not (options.clips or options.dataset or options.list):
        parser.error("nothing to do: give --clips, --dataset or --list")
    try:
        if options.clips:
            for entry in write_example_clips(options.clips):
                print(entry["file"], entry["voice"], entry["text"])
        if options.dataset:
            per_split = {"train": options.train_count, "held-out": options.held_out_count}
            counts = {(tag, split): per_split[split] for tag in options.tags for split in SPLITS}
            for (tag, split), clips in build_dataset(options.dataset, counts).items():
                print(f"{tag} {split}: {len(clips)} clips, {len(clips.samples) / SAMPLING_RATE / 60:.1f} minutes")
    except ModelError as error:
        parser.exit(2, f"{error}\n")
    if options.list:
        for utterance in islice(utterances(options.list, "held-out"), 20):
            print(utterance.voice, utterance.text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
