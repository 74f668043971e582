"""Times MaxText training the 1.3B model in full on synthetic data, as a peer of the program's own step.

    python tests/tools/maxtext_peer.py --packages DIR [--devices 4] [--axis data fsdp] [--out FILE.json]
        [--only REGEX] [--variant "NAME: scan_layers=false remat_policy=none --xla_gpu_...=..."] ...

Each variant runs in a process of its own: XLA's flags and the memory are then its own, and one that fails
becomes a row with `error`. A variant is a name and words: `option=value` for MaxText, `--xla...` for XLA, and
`recommended`, which stands for the XLA flags of MaxText's own scripts for GPUs. Later words win.

A step's time is the time between the completions of two steps, with the next step already queued, as MaxText
queues it. The seconds that MaxText prints are those between dispatches, which say little in a short run.
The weights, moments and gradients are float32, the compute is bfloat16; there is no padding and no packing.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = {
    "vocab_size": "32100",
    "base_emb_dim": "2048",
    "base_mlp_dim": "5461",
    "base_num_decoder_layers": "24",
    "base_num_query_heads": "32",
    "base_num_kv_heads": "32",
    "head_dim": "64",
    "decoder_block": "llama2",
    "mlp_activations": "['silu','linear']",
    "logits_via_embedding": "false",
}
TRAINING = {
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "grad_dtype": "float32",
    "opt_type": "adamw",
    "gradient_clipping_threshold": "1.0",
    "enable_dropout": "false",
    "z_loss_multiplier": "0.0",
    "use_iota_embed": "false",
    "dataset_type": "synthetic",
    "packing": "false",
}
# Nothing is written but the result, and nothing is asked of a network.
QUIET = {
    "run_name": "peer",
    "enable_checkpointing": "false",
    "enable_tensorboard": "false",
    "enable_goodput_recording": "false",
    "jax_cache_dir": "",
    "log_config": "false",
    "skip_jax_distributed_system": "true",
}
OFFLINE = {"DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# MaxText's src/maxtext/configs/gpu/a3/llama_2_7b/1vm.sh. docs/run_maxtext/run_maxtext_single_host_gpu.md also
# names xla_gpu_enable_triton_softmax_fusion, and other pages xla_gpu_enable_async_collectives: today's XLA
# refuses both.
RECOMMENDED = {
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    "--xla_gpu_enable_triton_gemm": "false",
    "--xla_gpu_enable_command_buffer": "",
    "--xla_gpu_enable_highest_priority_async_stream": "true",
    "--xla_gpu_all_reduce_combine_threshold_bytes": "134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes": "134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": "67108864",
    "--xla_gpu_pipeline_all_gather": "on",
    "--xla_gpu_pipeline_reduce_scatter": "on",
    "--xla_gpu_pipeline_all_reduce": "on",
    "--xla_gpu_enable_while_loop_double_buffering": "true",
    "--xla_gpu_enable_all_gather_combine_by_dim": "false",
    "--xla_gpu_enable_reduce_scatter_combine_by_dim": "false",
    "--xla_disable_hlo_passes": "rematerialization",
}
# Fastest first, by expectation, then those that need less memory. MaxText rematerializes any scanned layers:
# there, `none` is `full`. For unrolled layers its decoder has `none`, but MaxText 0.2.5 reads that option as
# null, which is `full` too: `work` puts it right. As MaxText is, the `minimal` ones are its fastest.
VARIANTS = """
unrolled, none, fused, flags: scan_layers=false remat_policy=none fused_qkv=true fused_mlp=true recommended
unrolled, none, flags: scan_layers=false remat_policy=none recommended
unrolled, none: scan_layers=false remat_policy=none
unrolled, minimal, flags: scan_layers=false remat_policy=minimal_with_context recommended
unrolled, minimal: scan_layers=false remat_policy=minimal_with_context
scan, minimal, flags: scan_layers=true remat_policy=minimal_with_context recommended
scan, minimal: scan_layers=true remat_policy=minimal_with_context
scan, full: scan_layers=true remat_policy=full
"""
PACKAGES = ("maxtext", "jax", "jaxlib", "flax", "optax", "jax-cuda13-plugin", "nvidia-cudnn-cu13")


def work(out: Path, warm: int, arguments: list[str]) -> None:
    """Trains with MaxText in this process, and writes what was measured."""
    began = time.perf_counter()
    import jax
    from maxtext.common.metric_logger import MetricLogger  # pyright: ignore[reportMissingImports]
    from maxtext.trainers.pre_train import train  # pyright: ignore[reportMissingImports]

    done, losses, compiled, found = [], [], [], {}
    write, describe = MetricLogger.write_metrics, MetricLogger.write_setup_info_to_tensorboard
    initialize = train.initialize

    def initialized(argv: Any) -> Any:
        config, recorder = initialize(argv)
        if config.remat_policy is None:
            config.get_keys()["remat_policy"] = "none"  # which the decoder knows; reading options loses it
        return config, recorder

    def write_metrics(self: Any, metrics: Any, *args: Any, **options: Any) -> Any:
        losses.append(float(metrics["scalar"]["learning/loss"]))  # waits for the step
        done.append(time.perf_counter())
        return write(self, metrics, *args, **options)

    def write_setup(self: Any, params: Any) -> Any:
        found["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        return describe(self, params)

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    train.initialize = initialized
    MetricLogger.write_metrics = write_metrics
    MetricLogger.write_setup_info_to_tensorboard = write_setup
    jax.monitoring.register_event_duration_secs_listener(note)
    train.main(["train", *arguments])
    steps = [after - before for before, after in zip(done[warm - 1 :], done[warm:], strict=False)]
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each]
    result = {
        "device": jax.devices()[0].device_kind,
        **found,
        "step_ms": 1e3 * statistics.median(steps),
        "mean_step_ms": 1e3 * statistics.mean(steps),
        "timed_steps": len(steps),
        "compile_seconds": sum(compiled),
        "first_step_seconds": done[0] - began,
        "peak_gib": max(peaks) / 2**30 if peaks else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
    }
    out.write_text(json.dumps(result))


def version_of(package: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read(variant: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """Returns a variant's name, options of MaxText and flags of XLA."""
    name, _, words = variant.partition(":")
    options: dict[str, str] = {}
    flags: dict[str, str] = {}
    for word in shlex.split(words):
        if word == "recommended":
            flags |= RECOMMENDED
        else:
            key, _, value = word.partition("=")
            (flags if key.startswith("--") else options)[key] = value
    return name.strip(), options, flags


def run(asked: argparse.Namespace, axis: str, options: dict[str, str], flags: dict[str, str]) -> dict:
    """Returns what a process of its own measures."""
    sharded = {"data": "1", "fsdp": "1"} | {axis: str(asked.devices)}
    gpu = asked.platform == "gpu"
    options = {
        **(MODEL | TRAINING | QUIET),
        "hardware": asked.platform,
        "attention": "cudnn_flash_jax" if gpu else "dot_product",
        "per_device_batch_size": str(asked.batch),
        "max_target_length": str(asked.length),
        "steps": str(asked.warm_up + asked.steps),
        **{f"ici_{name}_parallelism": size for name, size in sharded.items()},
        **options,
    }
    environment = dict(os.environ, **OFFLINE)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if gpu:
        environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(asked.devices))))
    else:
        environment["JAX_PLATFORMS"] = "cpu"
        flags = {"--xla_force_host_platform_device_count": str(asked.devices)} | flags
    given = [environment.get("XLA_FLAGS", ""), *(f"{name}={value}" for name, value in flags.items())]
    environment["XLA_FLAGS"] = " ".join(filter(None, given))
    paths = [*asked.packages, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "result.json"), Path(folder, "log.txt")
        environment |= {"HOME": folder, "TMPDIR": folder}
        options["base_output_directory"] = folder
        words = [f"{name}={value}" for name, value in options.items()]
        command = [sys.executable, Path(__file__).resolve(), "--work", out, str(asked.warm_up), *words]
        try:
            with log.open("w") as stream:
                subprocess.run(
                    command, cwd=folder, env=environment, stdout=stream, stderr=stream, timeout=asked.timeout
                )
            problem = "" if out.exists() else reason(log.read_text(errors="replace"))
        except subprocess.TimeoutExpired:
            problem = f"took more than {asked.timeout} s"
        if asked.log and problem:
            with asked.log.open("a") as stream:
                stream.write(f"== {shlex.join(words)}\n{log.read_text(errors='replace')}\n")
        return {"error": problem} if problem else json.loads(out.read_text())


def reason(log: str) -> str:
    """Returns the line of a failed process's output that says most: its last error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|F\d{4} ", line)]
    return (errors or lines or ["no output"])[-1][:500]


def described(row: dict[str, Any]) -> str:
    """Returns a row's figures in words."""
    if "error" in row:
        return row["error"]
    speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['tokens_per_second_device']:,.0f} a device"
    peak = f"peak {row['peak_gib']:.1f} GiB, " if row["peak_gib"] else ""
    rest = f"compiled in {row['compile_seconds']:.0f} s, {row['parameters']:,} parameters"
    return f"{row['step_ms']:.1f} ms (mean {row['mean_step_ms']:.1f}), {speed}, {peak}{rest}"


def main() -> None:
    """Prints a line for each variant, and writes all as JSON."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; rows are added to those it has")
    parser.add_argument("--log", type=Path, help="file for the output of variants that fail")
    folder = {"type": lambda path: Path(path).resolve(), "action": "append", "default": []}
    parser.add_argument("--packages", **folder, help="folder with MaxText, added to PYTHONPATH")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--axis", choices=("data", "fsdp"), nargs="+", default=["data"], help="mesh axis")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a device")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before these, at least 1")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a variant may take")
    parser.add_argument("--only", default="", help="regex of the names of the ready-made variants to run")
    parser.add_argument("--variant", action="append", default=[], help="runs this instead of the ready-made")
    parser.add_argument("--option", action="append", default=[], help="word that every variant has")
    asked = parser.parse_args()
    ready = [line for line in VARIANTS.strip().splitlines() if re.search(asked.only, line.partition(":")[0])]
    rows = json.loads(asked.out.read_text()) if asked.out and asked.out.exists() else []
    for variant in asked.variant or ready:
        name, options, flags = read(" ".join([variant, *asked.option]))
        for axis in asked.axis:
            row: dict[str, Any] = {"name": name, "devices": asked.devices, "axis": axis, "batch": asked.batch}
            row |= {"length": asked.length, "options": options, "xla_flags": flags}
            row |= run(asked, axis, options, flags)
            if "error" not in row:
                row["tokens_per_second_device"] = asked.batch * asked.length * 1e3 / row["step_ms"]
                row["tokens_per_second"] = asked.devices * row["tokens_per_second_device"]
            print(f"{name}, {asked.devices} x {axis}: {described(row)}", flush=True)
            rows.append(row)
            if asked.out:
                asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
