"""Conversations, read from files and tables, and written as token ids by the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import reading
from wanda_lightning.common.wording import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -1
"""In place of a token id, after the end of a conversation; no model takes it by mistake."""
_MARK = "wandalightning"


class Chats:
    """Conversations in rows with `messages` and perhaps `tools`, as TRL and OpenAI have them; errors name the row.

    Args:
        rows: The rows, also of a `datasets.Dataset`.
        source: Where they are from.
        lines: Their lines in a file, from 1.
        is_table: Whether a table has joined the keys of all rows, so that None stands for a key that a row lacks.
    """

    def __init__(
        self, rows: Any, source: str, lines: Sequence[int] = (), is_table: bool = False
    ) -> None:
        self.source = source
        self._rows = rows
        self._lines = lines
        self._is_table = is_table
        self._known_roles: set[str] = set()  # which the chat template writes

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, index: int) -> str:
        row = f"Line {self._lines[index]}" if self._lines else f"Row {index + 1}"
        return f"{row} of {self.source}"

    def row(self, index: int) -> Any:
        """Return a row; raise a ValueError if it has no messages."""
        row = self._rows[index]
        if self._is_table:
            row = _without_none(row)
        messages = row.get("messages") if isinstance(row, Mapping) else None
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            raise UserError(
                f"{self._place(index)} must have messages, a list of objects with a role and a content, but it is "
                f"{row!r:.120}."
            )
        return row

    def tokens(self, index: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of a whole conversation."""
        row = self.row(index)
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer must have a chat template, since {self.source} has messages, but it has none. Use the "
                "tokenizer of a chat model, or set its chat_template."
            )
        try:
            text = _written(row["messages"], row.get("tools"), tokenizer)
        except Exception as error:  # a template raises errors of many kinds
            raise UserError(
                f"{self._place(index)} cannot be written by the tokenizer's chat template: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error
        self._refuse_ignored_roles(index, row, tokenizer)

        # The template has written all special tokens, also the one that begins a text.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _refuse_ignored_roles(
        self, index: int, row: Any, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Refuse a role whose messages the template leaves out without an error; each role is tried once."""
        messages = row["messages"]
        for role in dict.fromkeys(message["role"] for message in messages):
            if role in self._known_roles:
                continue
            marked = []
            for message in messages:
                # Beside calls of tools, a template may leave out the content.
                is_text = isinstance(message.get("content"), str) and not message.get("tool_calls")
                is_tried = is_text and message["role"] == role
                marked.append({**message, "content": _MARK} if is_tried else message)
            if marked == messages:
                continue
            try:
                text = _written(marked, row.get("tools"), tokenizer)
            except Exception:  # it reads this content
                text = _MARK
            if _MARK not in text:
                raise UserError(
                    f"{self._place(index)} must have roles that the tokenizer's chat template writes, but it leaves "
                    f"out messages of {role!r}."
                )
            self._known_roles.add(role)

    def joined(
        self,
        tokenizer: PreTrainedTokenizerBase,
        most: int | None = None,
        order: Iterable[int] | None = None,
    ) -> list[int]:
        """Return the token ids of conversations one after the other, from the first ones if `most` tokens suffice."""
        ids: list[int] = []
        for index in range(len(self)) if order is None else order:
            if most is not None and len(ids) >= most:
                break
            ids += self.tokens(index, tokenizer)
        return ids


def _is_message(message: Any) -> bool:
    """Whether an object has a role, and a content or calls of tools, which stand without a content."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return "content" in message or "tool_calls" in message


def _written(messages: Any, tools: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(tools, str):  # as TRL reads them, too: in a table, JSON keeps each tool as it is
        tools = json.loads(tools)
    text: Any = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
    return str(text)


def is_chat(row: object) -> bool:
    """Whether a row has messages, and no text beside them."""
    return isinstance(row, Mapping) and "messages" in row and "text" not in row


def chats_in_jsonl(source: str) -> Chats | None:
    """Return the conversations of a .jsonl file; None if its first line is no conversation.

    They are not read by `datasets` (5.2), which refuses a file of 20 MB if only its last message calls a tool.
    """
    rows: list[Any] = []
    lines = []
    # utf-8-sig reads a file with or without a byte order mark.
    with (
        reading("data", source),
        Path(source).expanduser().open(encoding="utf-8-sig") as file,
    ):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = None  # perhaps the start of an object over several lines
                if rows:
                    raise UserError(
                        f"Line {number} of {source} must be a JSON object with messages: {one_line(error)}"
                    ) from error
            if not rows and not is_chat(row):
                return None
            rows.append(row)
            lines.append(number)
    chats = Chats(rows, source, lines)
    for index in range(len(chats)):
        chats.row(index)
    return chats if rows else None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    return value
