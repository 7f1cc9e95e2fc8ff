"""What a model wrote, as HTML: code highlighted for its language, transcripts in their direction; all of it escaped."""

from __future__ import annotations

import html

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Keyword, Literal, Name, Number, Operator, String, _TokenType
from pygments.util import ClassNotFound

_LEXER_NAMES = {
    "d": "d",
    "jl": "julia",
    "lua": "lua",
    "pl": "perl",
    "py": "python",
    "r": "r",
    "rb": "ruby",
    "rkt": "racket",
    "rs": "rust",
    "swift": "swift",
}
_CLASSES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "c"),
    (Keyword, "k"),
    (Operator.Word, "k"),
    (String, "s"),
    (Number, "n"),
    (Literal, "n"),
    (Name.Function, "f"),
    (Name.Class, "f"),
    (Name.Builtin, "b"),
    (Name.Decorator, "b"),
)


def lexer(tag: str | None) -> Lexer:
    """The Pygments lexer for a code tag; plain text for a tag that is not a language's."""
    options = {"stripnl": False, "ensurenl": False}
    try:
        return get_lexer_by_name(_LEXER_NAMES.get(tag or "py", tag or "py"), **options)
    except ClassNotFound:
        return get_lexer_by_name("text", **options)


def _css_class(token_type: _TokenType) -> str | None:
    return next((name for kind, name in _CLASSES if token_type in kind), None)


def highlighted(prompt: str, completion: str, tag: str | None, show_prompt: bool = True) -> str:
    """`prompt` and its `completion` as one piece of code, the prompt marked as what was given, or left out.

    Both go through the lexer together, since a completion alone may begin inside a string or a comment.
    """
    given, written = [], []
    position = 0
    # Lexers read "\r\n" as "\n": do it first, so that the border between prompt and completion stays where it is.
    prompt, completion = (text.replace("\r\n", "\n").replace("\r", "\n") for text in (prompt, completion))
    for token_type, text in lexer(tag).get_tokens(prompt + completion):
        border = max(0, min(len(text), len(prompt) - position))
        position += len(text)
        name = _css_class(token_type)
        for part, side in ((text[:border], given), (text[border:], written)):
            if part:
                side.append(f'<span class="{name}">{html.escape(part)}</span>' if name else html.escape(part))
    before = f'<span class="given">{"".join(given)}</span>' if show_prompt else ""
    return f'<pre class="code">{before}{"".join(written)}</pre>'


def transcript(text: str, tag: str | None) -> str:
    """A transcript, in its own writing direction."""
    language = f' lang="{html.escape(tag)}"' if tag else ""
    return f'<p class="transcript" dir="auto"{language}>{html.escape(text)}</p>'


def marked_transcript(reference: str, text: str, tag: str | None) -> str:
    """A transcript held against what was said: missed words struck out, words written instead or besides underlined.

    The words are aligned as word error rate aligns them, one by one as they stand.
    """
    import jiwer  # with its matcher in C, only where a transcript is judged

    aligned = jiwer.process_words(reference, text)
    said, written = aligned.references[0], aligned.hypotheses[0]
    parts = []
    for chunk in aligned.alignments[0]:
        missed = html.escape(" ".join(said[chunk.ref_start_idx : chunk.ref_end_idx]))
        heard = html.escape(" ".join(written[chunk.hyp_start_idx : chunk.hyp_end_idx]))
        if chunk.type == "equal":
            parts.append(heard)
        else:
            parts += [f"<del>{missed}</del>"] * bool(missed) + [f"<ins>{heard}</ins>"] * bool(heard)
    language = f' lang="{html.escape(tag)}"' if tag else ""
    return f'<p class="transcript" dir="auto"{language}>{" ".join(parts)}</p>'
