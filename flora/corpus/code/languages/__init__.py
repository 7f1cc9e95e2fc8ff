"""The ten languages of the code corpus, by the tag that MultiPL-E gives them."""

from flora.corpus.code.languages.base import Language
from flora.corpus.code.languages.d import D
from flora.corpus.code.languages.jl import Julia
from flora.corpus.code.languages.lua import Lua
from flora.corpus.code.languages.pl import Perl
from flora.corpus.code.languages.py import Python
from flora.corpus.code.languages.r import R
from flora.corpus.code.languages.rb import Ruby
from flora.corpus.code.languages.rkt import Racket
from flora.corpus.code.languages.rs import Rust
from flora.corpus.code.languages.swift import Swift

LANGUAGES: dict[str, Language] = {
    language.tag: language for language in (D(), Perl(), Ruby(), Rust(), Racket(), Swift(), Julia(), Lua(), R(), Python())
}
