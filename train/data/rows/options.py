"""How documents and examples become rows: what the user chooses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mora_jax.errors import InputError
from train.data.text.forms import TEXT, Form

if TYPE_CHECKING:
    from mora_jax.hf.chat import ChatTemplate

Loss = Literal["completions", "all"]
Overlong = Literal["drop", "cut"]


@dataclass(frozen=True)
class RowOptions:
    """How documents and examples become rows.

    Attributes:
      form: what an example is made of.
      loss: what counts: what is to be answered, or all of each example. A document is all answer.
      pack: whether a row holds several. If not, it holds one, and padding.
      overlong: whether an example longer than a row is dropped or cut.
      template: writes conversations as text, and prompts with completions if there is one for them.
    """

    form: Form = TEXT
    loss: Loss = "completions"
    pack: bool = True
    overlong: Overlong = "drop"
    template: "ChatTemplate | None" = None

    def __post_init__(self) -> None:
        if self.joined and self.overlong != "drop":
            raise InputError("--overlong is for rows of whole examples; joined text has none; add --no-pack")

    def facts(self) -> dict[str, Any]:
        """Returns what a data set states of them. The defaults are those of joined text."""
        template = self.template.sha256 if self.template else ""
        own = {} if self.form.name == "text" else {"fields": self.form.fields}
        return own | {
            "form": self.form.name,
            "loss": self.loss,
            "pack": self.pack,
            "overlong": self.overlong,
            "template_sha256": template,
        }

    @property
    def joined(self) -> bool:
        """Whether rows are cut from joined documents: they have tokens alone, which all count."""
        return self.form.name == "text" and self.pack


JOINED = RowOptions()
