"""From rows, as files and datasets have them, to texts: the field `text`, or `messages` through the chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.errors import CalibrationError, first_line


def texts_of(rows: Sequence[Any], name: str, tokenizer: Any) -> list[str]:
    """The text of every row that has some, in their order.

    A row is a text, a mapping with `text` (which goes first) or `messages` (a list of {"role", "content"}), or a list
    of messages. Raises CalibrationError with the row's number (from 1) for any other.
    """
    return [text for number, row in enumerate(rows, 1) if (text := _text(row, f"row {number} of {name}", tokenizer))]


def holds_ids(row: Any) -> bool:
    """Whether a row is tokens, not text: anything but a text, messages, or a mapping without input_ids."""
    if isinstance(row, Mapping):
        return "input_ids" in row
    return not (isinstance(row, str) or _is_conversation(row))


def _text(row: Any, what: str, tokenizer: Any) -> str:
    text = _found(row, what, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise CalibrationError(f"{what} holds half a character ({half}), which is no Unicode text") from None
    return text


def _found(row: Any, what: str, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if _is_conversation(row):
        return _rendered(row, what, tokenizer)
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{what} is a {_kind(row)}; expected a text, or an object with 'text' or 'messages'")
    if (text := row.get("text")) is not None:
        if not isinstance(text, str):
            raise CalibrationError(f"'text' in {what} is a {_kind(text)}, not a text")
        return text if text.strip() else ""
    if (messages := row.get("messages")) is not None:
        return _rendered(messages, what, tokenizer)
    if empty := next((name for name in ("text", "messages") if name in row), None):
        raise CalibrationError(f"{what} has no text: its {empty!r} is null; remove it")
    columns = ", ".join(repr(str(column)[:40]) for column in list(row)[:12]) or "none"
    raise CalibrationError(
        f"{what} has neither 'text' nor 'messages' (its columns: {columns}); rename the column that holds the text to "
        "text, or make conversations a list of messages with role and content"
    )


def _is_conversation(row: Any) -> bool:
    return isinstance(row, list | tuple) and bool(row) and isinstance(row[0], Mapping) and "role" in row[0]


def _rendered(messages: Any, what: str, tokenizer: Any) -> str:
    """A conversation as the model was trained to read it, without the token that begins every window anyway."""
    if isinstance(messages, str):  # as CSV holds them
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise CalibrationError(f"'messages' in {what} is a text that is no JSON") from None
    if not isinstance(messages, list | tuple) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        raise CalibrationError(f"'messages' in {what} is no list of messages with role and content")
    if not messages:
        return ""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(f"{what} holds messages, but the tokenizer has no chat template; give texts instead")
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except Exception as error:  # templates are programs, which raise what they like
        raise CalibrationError(f"the chat template refuses the messages of {what}: {first_line(error)}") from None
    if not isinstance(text, str):
        raise CalibrationError(f"the chat template makes no text of the messages of {what}")
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")


def _kind(value: Any) -> str:
    names = {type(None): "null", list: "list", tuple: "list", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
