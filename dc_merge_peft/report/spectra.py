"""The sections on singular values: how energy was spread before and is after, and what truncation has cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dc_merge_peft.inspection.data import ModuleSpectrum, landmarks, median
from dc_merge_peft.markup import Child, Html, element
from dc_merge_peft.outputs.rows import from_to
from dc_merge_peft.report.chart import Curve, line_chart, swatch
from dc_merge_peft.report.colours import LINES
from dc_merge_peft.report.data import MergeReport
from dc_merge_peft.report.heat import heat_map
from dc_merge_peft.report.numbers import energy_curve, kinds_of, largest, spectrum_curve, truncation_by_layer
from dc_merge_peft.report.sections import UNKNOWN, section, what
from dc_merge_peft.report.tables import clipped, data_table

_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2 1 2")
_COLUMNS = ("delta", "rank", "norm", "S first", "S middle", "S last", "effective rank")


def spectra(report: MergeReport) -> Html:
    """Charts and a table of singular values before and after."""
    before = {adapter.name: adapter.measured for adapter in report.before.adapters}
    after = report.after.measured
    rows = [_numbers(adapter.name, adapter.measured, adapter.norm) for adapter in report.before.adapters]
    norm = sum(module.norm**2 for module in after) ** 0.5
    drawn = {name: modules for name, modules in before.items() if modules}
    charts = [_charts(drawn, after), _legend(list(drawn), merged=bool(after))] if drawn or after else None
    return section(
        "spectra",
        "Singular values before and after",
        what(
            "Medians over modules: adapters with their scaling, without their weights, the merged one with alpha. A flatter line "
            "spreads its energy over more directions; the effective rank says how many are in use."
        ),
        charts,
        data_table(
            "Singular values", _COLUMNS, [*rows, _numbers("merged", after, norm)], right=_COLUMNS[1:], last=True
        ),
    )


def _charts(before: Mapping[str, Sequence[ModuleSpectrum]], after: Sequence[ModuleSpectrum]) -> Html:
    styles = _styles(len(before))
    figures = []
    for title, curve, percent in (
        ("Singular values", spectrum_curve, False),
        ("Energy in the first directions", energy_curve, True),
    ):
        curves = [Curve(curve(modules), *style) for modules, style in zip(before.values(), styles, strict=True)]
        curves += [Curve(curve(after), "merged")] if after else []
        said = (
            f"{title} of {len(before)} adapters{' and of the merged one' if after else ''}; the table has the numbers"
        )
        chart = line_chart(curves, title=said, percent=percent)
        caption = element(
            "figcaption", element("strong", title), ", % of the sum of S\N{SUPERSCRIPT TWO}" if percent else ", S"
        )
        figures.append(element("figure", caption, chart))
    return element("div", figures, class_="charts")


def _styles(count: int) -> list[tuple[str, str | None]]:
    """A colour and a pattern a line; many lines are alike, since nobody could tell them apart."""
    return [(f"l{index}", _DASHES[index]) for index in range(count)] if count <= LINES else [("thin", None)] * count


def _legend(names: Sequence[str], *, merged: bool) -> Html:
    styles = _styles(len(names))
    many = len(names) > LINES
    entries = [("thin", None, f"{len(names)} adapters, a line each")] if many else [
        (*style, clipped(name, 60)) for name, style in zip(names, styles, strict=True)
    ]  # fmt: skip
    entries += [("merged", None, "merged")] if merged else []
    return element(
        "ul",
        [element("li", swatch(style, dash), element("span", name)) for style, dash, name in entries],
        class_="legend",
    )


def _numbers(name: str, modules: Sequence[ModuleSpectrum], norm: float) -> tuple[Child, ...]:
    marks, effective = landmarks(modules), median(module.effective_rank for module in modules)
    return (
        name,
        from_to(sorted(len(module.S) for module in modules), UNKNOWN),
        f"{norm:.3g}" if modules else UNKNOWN,
        *([f"{value:.3g}" for value in marks] if marks else [UNKNOWN] * 3),
        UNKNOWN if effective is None else f"{effective:.1f}",
    )


def truncation(report: MergeReport) -> Html:
    """Rank kept and relative error, by kind and by layer."""
    overall, merged = report.truncation_error, report.after.spectra
    columns = ("kind", "modules", "shape", "rank", "rank before", "median error", "largest error")
    rows = []
    for (kind, (m, n)), modules in kinds_of(merged).items():
        errors = [module.truncation_error for module in modules if module.truncation_error is not None]
        full = max((module.full_rank for module in modules if module.full_rank is not None), default=UNKNOWN)
        middle = median(errors)
        rows.append(
            (
                kind,
                len(modules),
                f"{m} \N{MULTIPLICATION SIGN} {n}",
                from_to(sorted(module.rank for module in modules)),
                full,
                UNKNOWN if middle is None else f"{middle:.2%}",
                f"{max(errors):.2%}" if errors else UNKNOWN,
            )
        )
    return section(
        "truncation",
        "Truncation error",
        element("p", _in_words(overall, known=any(module.truncation_error is not None for module in merged.values()))),
        data_table("Truncation error by kind of module", columns, rows, right=columns[1:]),
        _by_layer(report),
    )


def _in_words(overall: float | None, *, known: bool) -> list[Child]:
    if overall is None:
        said = "The error over all modules together is not recorded."
    elif overall == 0:
        said = "Nothing was cut: every module keeps the whole rank of the merge."
    else:
        said = f"Relative Frobenius error over all modules together: {overall:.2%}."
    if known or not overall:
        return [said]
    again = element("code", "dc-merge report --config dc_merge.yaml")
    return [said, " A saved adapter does not tell the modules' own errors; ", again, " merges again and shows them."]


def _by_layer(report: MergeReport) -> Html | None:
    rows = truncation_by_layer(report.after.spectra)
    top = largest(rows, 0.0)
    if not top:
        return None
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    return heat_map("Truncation error by layer and kind", rows, kinds, limit=top, percent=True, id_="truncation-map")
