"""Task functions that lmms-eval calls in its own environment: pictures, and the score of an answer from 0 to 1.

`llama3v evaluate` copies this file beside the task files that it writes. Scoring follows the benchmarks, by lmms-eval's
own functions; only MathVista's answers are extracted by rules here, where lmms-eval pays a judge.
"""

import re


def demo_visual(doc):
    from PIL import Image

    return [Image.open(doc["image"]).convert("RGB")]


def demo(doc, results):
    return {"score": float(results[0].strip() == doc["answer"])}


def mmmu(doc, results):
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, mmmu_process_results

    return {"score": evaluate_mmmu([mmmu_process_results(doc, results)["mmmu_acc"]])[1]["acc"]}


def mathvista(doc, results):
    from lmms_eval.tasks.mathvista.utils import mathvista_evaluator

    kind, answer_type, choices = doc["question_type"], doc["answer_type"], doc["choices"]
    extraction = extract(results[0].strip(), kind, answer_type, choices or [])
    precision = int(doc["precision"] or 0)
    told = mathvista_evaluator.normalize_extracted_answer(extraction, choices, kind, answer_type, precision)
    return {"score": float(mathvista_evaluator.safe_equal(told, doc["answer"]))}


def extract(response, question_type, answer_type, choices):
    """Extract the answer from a response: a choice's letter or text, else the last number or list, else all of it."""
    if question_type == "multi_choice":
        letters = re.findall(r"\(([A-Z])\)", response) or re.findall(r"^([A-Z])\b|\b([A-Z])\.?$", response)
        last = "".join(letters[-1]) if letters else ""
        if last and ord(last) - ord("A") < len(choices):
            return last
        named = [choice for choice in choices if choice.lower() in response.lower()]
        return max(named, key=lambda choice: (response.lower().rfind(choice.lower()), len(choice)), default=response)
    pattern = r"\[[^\[\]]*\]" if answer_type == "list" else r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+"
    found = re.findall(pattern, response) if answer_type != "text" else []
    return (found[-1] if answer_type == "list" else found[-1].replace(",", "")) if found else response
