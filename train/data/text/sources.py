"""The kinds of text that rows are made of: files, data sets of TFDS, and those of the Hugging Face Hub."""

from mora_jax.errors import InputError
from train.data.text.files import FileShard, file_shards
from train.data.text.forms import TEXT, Form
from train.data.text.hub import hub_files, is_dataset
from train.data.text.share import Share, TextShard
from train.data.text.tfds import PREFIX, tfds_shards


def open_text(
    source: str, validation: str, tfds_data_dir: str = "", form: Form = TEXT, share: float = 0.0
) -> dict[str, list[TextShard]]:
    """Returns the shards of the splits "train" and "validation"; without a source, of the latter alone.

    Args:
      source: training text: a glob, a folder, a file (see `files.shards`), `tfds:NAME`, or a data set of the
        Hub (see `hub_files`); empty for none.
      validation: validation text, likewise; empty for the validation split of a `tfds:` source.
      tfds_data_dir: folder in which `tfds:NAME` is looked up; empty for TFDS's default.
      form: which keys, columns or features hold what.
      share: fraction of the training text that is the validation text instead; 0 for none.

    Raises:
      InputError: text is missing, cannot be read, or belongs to both splits.
    """
    if share:
        return _shared(source, validation, tfds_data_dir, form, share)
    if not validation and not source.startswith(PREFIX):
        raise InputError(
            "--validation is missing, or --validation-share; only a tfds: source has a validation split"
        )
    text = {"train": _shards(source, "train", tfds_data_dir, form)} if source else {}
    text |= {"validation": _shards(validation or source, "validation", tfds_data_dir, form)}
    both = [shard for shard in text.get("train", []) if shard in text["validation"]]
    if both:
        raise InputError(f"{both[0].name} is in the training and the validation text; name other files")
    return text


def _shared(
    source: str, validation: str, tfds_data_dir: str, form: Form, share: float
) -> dict[str, list[TextShard]]:
    if not 0 < share < 1:
        raise InputError(f"--validation-share must be above 0 and below 1, not {share}")
    if validation or not source:
        raise InputError("--validation-share needs --source, and no --validation")
    shards = _shards(source, "train", tfds_data_dir, form)
    return {
        split: [Share(shard, share, held_out) for shard in shards]
        for split, held_out in (("train", False), ("validation", True))
    }


def _shards(source: str, split: str, tfds_data_dir: str, form: Form) -> list[TextShard]:
    if source.startswith(PREFIX):
        if form.name != "text":
            raise InputError(f"{source} holds text alone; for the form {form.name}, name files")
        return [*tfds_shards(source, split, tfds_data_dir, *form.keys)]
    if is_dataset(source):
        return [FileShard(path, path.stat().length, form) for path in hub_files(source, split)]
    return [*file_shards(source, form)]
