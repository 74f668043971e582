"""The chat template that writes examples as text: one that the user gives, or the tokenizer's own.

Prompts and completions are written by one only if the user gives it.
"""

from dataclasses import replace

from mora_jax.errors import InputError
from mora_jax.hf.chat import TEMPLATE_FILE, ChatTemplate
from mora_jax.hf.tokenizer_files import JSON, TokenizerFiles
from mora_jax.io import read_text
from train.data.rows.options import RowOptions

_TEMPLATE_BYTES = 1 << 20


def with_template(
    files: TokenizerFiles, options: RowOptions, template: str, bos: bool
) -> tuple[TokenizerFiles, RowOptions]:
    """Returns a tokenizer with the chat template that is used, and the options with it.

    Args:
      files: the tokenizer.
      options: what else the user chose.
      template: a file that holds the template; empty for the tokenizer's own.
      bos: whether a begin-of-text token is wanted, which a template writes itself.

    Raises:
      InputError: there is no template, it is no Jinja, or it is not for this form.
    """
    if options.form.name == "text" and template:
        raise InputError("--template is for prompts and conversations, not for the form text")
    if options.form.name != "messages" and not template:
        return files, options
    if bos:
        raise InputError("--bos does not go with a chat template, which writes the token itself")
    if files.encoder != JSON:
        raise InputError(
            f"{files.place} has no {JSON}, which encodes the special tokens of a chat template; let "
            "transformers write it (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    if template:
        source = read_text(template, _TEMPLATE_BYTES).encode()
        files = replace(files, files={**files.files, TEMPLATE_FILE: source})
    read = ChatTemplate.read(replace(files, place=template or files.place))
    return files, replace(options, template=read)
