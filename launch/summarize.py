"""Writes summary.json of a quickstart run and prints it as a table."""

import json
import pathlib

from absl import app, flags

from fastvlm_jax.metrics.rows import read_metrics

RUN = flags.DEFINE_string("run", None, "folder of the quickstart run", required=True)
TOTAL = flags.DEFINE_integer("seconds", None, "wall time of the whole run, seconds", required=True)


def main(_):
    run = pathlib.Path(RUN.value)
    evaluation = json.loads((run / "evaluation" / "easy-vqa-own.json").read_text())
    names = ("stage0_clip", "stage1_align", "stage15_pretrain", "stage2_instruct")
    stages = [run / name for name in names if (run / name).is_dir()]  # stage 0 is left out by default
    summary = {
        "accuracy": evaluation["score"] / 100,
        "standard_error": (evaluation["standard_error"] or 0) / 100,
        "baseline_accuracy": evaluation["figures"]["baseline_accuracy"],
        "test_questions": evaluation["questions"],
        "train_seconds": round(sum(read_metrics(stage)[-1]["seconds"] for stage in stages), 1),
        "total_seconds": TOTAL.value,
        **json.loads((run / "export.json").read_text()),
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    accuracy = f"{summary['accuracy']:.1%} ± {summary['standard_error']:.1%} of {summary['test_questions']:,} questions"
    rows = [
        ("accuracy on the test split", accuracy),
        ("baseline (most frequent answer)", f"{summary['baseline_accuracy']:.1%}"),
        ("minutes: training, all", f"{summary['train_seconds'] / 60:.1f}, {summary['total_seconds'] / 60:.1f}"),
        ("exported logits differ by at most", f"{summary['export_max_abs_diff']:.1e}"),
        ("answers equal in transformers", f"{summary['export_same_answers']} of {summary['export_same_answers']}"),
        ("pictures", f"{run / 'report_loss.png'}, {run / 'report_samples.png'}"),
        ("page", run / "report.html"),
        ("page of answers", run / "evaluation" / "predictions.html"),
        ("model", stages[-1]),
        ("model for transformers", run / "export_hf"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<34}{value}")


if __name__ == "__main__":
    app.run(main)
