"""Which tokens may follow a row's tokens, and a path of a tree below them, under the row's `Constraint`.

The grammar itself is llguidance's (the extra `grammar`). A matcher stands behind the row's emitted tokens and walks along the
paths of a tree, forth and back; each path is asked about once a round, first by the draft and then by verify.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from ..core.constraint import JSON_OBJECT, REGEX, Constraint
from ..core.params import SamplingParams
from ..errors import InputError, UnsupportedError, first_line

if TYPE_CHECKING:
    from ..target.target import Target

# Bytes of UTF-8. A vocabulary that has each of them as a token can write every text, so that no path is a dead end.
UTF8 = frozenset(range(0xF5)) - {0xC0, 0xC1}
END = "<|end of constraint|>"
# A schema may carry options for llguidance; these two would let it ignore a keyword.
STRICT = {"lenient": False, "coerce_one_of": False}
# Between the parts of JSON: a space, or a new line and its indent. With any amount of it allowed, models write whitespace
# without end. A schema may say otherwise under "x-guidance".
SPACED = {"whitespace_pattern": r" |\n[ \t]{0,16}"}

Path = tuple[int, ...]


class Vocabulary:
    """The tokens of a tokenizer as bytes.

    Args:
        tokens: llguidance's tokenizer.
        size: tokens of the model; a mask has so many bits at least.
        end: a token of llguidance's alone, that stands for the end of the text.
    """

    _known: ClassVar[WeakKeyDictionary[Any, Vocabulary]] = WeakKeyDictionary()

    def __init__(self, tokens: Any, size: int, end: int) -> None:
        self.tokens, self.size, self.end = tokens, size, end

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> Vocabulary:
        """The vocabulary of a Hugging Face tokenizer; made once, as that takes a second for a large one.

        Raises:
            InputError: llguidance is not installed, or there is no tokenizer.
            UnsupportedError: the tokens are not made of bytes.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise InputError("a constraint needs llguidance: pip install 'glidecape[grammar]'") from None
        if tokenizer is None:
            raise InputError("a constraint is about text, and this target has no tokenizer: load one with the model")
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UnsupportedError(_no_bytes("it is not of the tokenizers library"))
        if (known := cls._known.get(tokenizer)) is not None and known.size == size:
            return known
        try:
            from tokenizers import Tokenizer

            inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            inner.no_padding()
            inner.no_truncation()
            inner.add_special_tokens([END])
            end = inner.token_to_id(END)
            assert end is not None
            made = cls(LLTokenizer(inner.to_str(), n_vocab=max(size, end + 1), eos_token=end), size, end)
        except ValueError as error:
            raise UnsupportedError(_no_bytes(first_line(error))) from None
        bytes_ = {made.tokens.decode_bytes([token]) for token in range(size)}
        if missing := [byte for byte in UTF8 if bytes([byte]) not in bytes_]:
            raise UnsupportedError(_no_bytes(f"byte 0x{missing[0]:02X} is no token"))
        cls._known[tokenizer] = made
        return made

    def matcher(self, constraint: Constraint) -> Any:
        """A matcher at the beginning of the text. It is read each time: a copy of one would share its limits.

        Raises:
            InputError: the constraint cannot be read, uses what llguidance does not support, or allows no text.
        """
        from llguidance import LLMatcher, LLParserLimits

        if constraint.kind == REGEX:
            grammar = LLMatcher.grammar_from_regex(constraint.text)
        else:
            schema = '{"type": "object"}' if constraint.kind == JSON_OBJECT else constraint.text
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=SPACED, overrides=STRICT)
        made = LLMatcher(self.tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if not made.is_error():
            made.compute_bitmask()  # finds that no text is allowed
        if made.is_error():
            raise InputError(f"the {constraint.kind.replace('_', ' ')} cannot be used: {_reason(made)}")
        return made


class Grammar:
    """The state of one row under its constraint.

    Args:
        vocabulary: of the row's tokenizer.
        constraint: of the row.
        ends: tokens that end the row and are no text. They may follow where the text may end.
    """

    def __init__(self, vocabulary: Vocabulary, constraint: Constraint, ends: Iterable[int]) -> None:
        self.vocabulary, self.constraint, self.ends = vocabulary, constraint, tuple(ends)
        self.restart()

    def restart(self) -> None:
        """Go back to the row's beginning: after an error a matcher is of no use any more."""
        self._matcher = self.vocabulary.matcher(self.constraint)
        self._known = 0  # emitted tokens that the matcher has consumed
        self._at: Path = ()  # tokens that it has consumed besides
        self._allowed: dict[Path, bytes | None] = {}

    def update(self, emitted: Sequence[int]) -> None:
        """Go on to the end of the row's emitted tokens: paths begin there from now on."""
        new = tuple(emitted[self._known :])
        if new:
            if not self._walk(new):
                self._check(gave_up=True)  # `complete` has seen that they are allowed
            after = self._allowed.get(new)
            self._known, self._at = len(emitted), ()
            self._allowed = {} if after is None else {(): after}

    def allowed(self, path: Path) -> bytes | None:
        """The tokens that may follow the emitted ones and a path below them: bit `token % 8` of byte `token // 8`.

        None: the path breaks the constraint, or is past the end. Empty: the text is complete, and no token may follow.
        """
        if path not in self._allowed:
            self._allowed[path] = self._mask() if self._walk(path) else None
        return self._allowed[path]

    def follows(self, tokens: Sequence[int]) -> int:
        """How many of the tokens may follow the emitted ones, one after the other; an end is none of them."""
        self._walk(tuple(tokens))
        return len(self._at)

    def complete(self, tokens: Sequence[int]) -> int:
        """After how many of these tokens the text is complete, so that nothing may follow; 0 if it is not.

        Raises:
            InputError: the constraint forbids one of them.
        """
        for n, token in enumerate(tokens):
            mask = self.allowed(tuple(tokens[:n]))
            if not mask:
                return n
            if not mask[token // 8] >> token % 8 & 1:
                raise InputError(
                    f"token {token} came out, because no token that the constraint allows has a finite logit"
                )
        return len(tokens) if self.allowed(tuple(tokens)) == b"" else 0

    def _walk(self, path: Path) -> bool:
        """Bring the matcher to the end of a path; False, and as far as it goes, where the path breaks the constraint."""
        same = 0
        while same < min(len(path), len(self._at)) and path[same] == self._at[same]:
            same += 1
        if same < len(self._at):
            self._matcher.rollback(len(self._at) - same)
        if same < len(path):
            same += self._matcher.try_consume_tokens(list(path[same:]))
        self._at = path[:same]
        reached = same == len(path)
        self._check(gave_up=not reached and self._may_follow(path[same]))
        return reached

    def _may_follow(self, token: int) -> bool:
        """Does the mask of the place where the matcher is, if it is known, allow a token that is text?"""
        mask = self._allowed.get(self._at)
        return bool(mask and token not in self.ends and mask[token // 8] >> token % 8 & 1)

    def _mask(self) -> bytes:
        bits = bytearray(self._matcher.compute_bitmask())
        self._check()
        for token in (*self.ends, self.vocabulary.end):
            bits[token // 8] &= ~(1 << token % 8)
        if bits.count(0) == len(bits):
            return b""
        if self._matcher.is_accepting():
            for token in self.ends:
                bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    def _check(self, gave_up: bool = False) -> None:
        """`gave_up`: the matcher did not take a token that it had allowed. It does so at a limit, and tells no error."""
        if gave_up or self._matcher.is_error():
            reason = _reason(self._matcher) or "it does not take a token that it allowed"
            raise InputError(f"the constraint is too complex for llguidance: {reason}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Grammar:
        made = Grammar(self.vocabulary, self.constraint, self.ends)
        made._matcher, made._known, made._at, made._allowed = (
            self._matcher.deep_copy(),
            self._known,
            self._at,
            dict(self._allowed),
        )
        return made


def new_grammar(params: SamplingParams, stop_ids: Iterable[int], target: Target) -> Grammar | None:
    """The state of a row at its beginning; None for a row without a constraint.

    Raises:
        InputError, UnsupportedError: see `Vocabulary`; or the constraint allows the empty text alone.
    """
    if params.constraint is None:
        return None
    vocabulary = Vocabulary.of(target.tokenizer, target.vocab_size)
    no_text = {*target.eos_token_ids, *filter(vocabulary.tokens.is_special_token, stop_ids)}
    made = Grammar(vocabulary, params.constraint, no_text.intersection(stop_ids))
    if made.allowed(()) == b"":
        raise InputError("the constraint allows no text but the empty one: there is nothing to decode")
    return made


def _no_bytes(reason: str) -> str:
    return (
        "a constraint needs a tokenizer whose tokens are bytes, such as byte-level BPE or SentencePiece with byte fallback, "
        f"and this target's is not one ({reason}): decode without a constraint"
    )


def _reason(matcher: Any) -> str:
    said = matcher.get_error()
    if "NoExtension" in said:
        return "no text of this vocabulary follows it"
    return " ".join(line.strip() for line in said.splitlines())[:300]
