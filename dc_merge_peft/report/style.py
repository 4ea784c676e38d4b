"""The page's style sheet. Both themes are plain variables; three radio buttons choose between them without a script."""

from __future__ import annotations

from dc_merge_peft.report.colours import LINES, STEPS, theme

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
"DejaVu Sans",Arial,sans-serif}
main,header,footer{max-width:76rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:1.5rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .35rem;padding-top:1rem;border-top:1px solid var(--rule);font-weight:650}
h3{font-size:.95rem;margin:1.25rem 0 .3rem;font-weight:600}
p{margin:.35rem 0 .75rem;max-width:46rem;overflow-wrap:anywhere}
.lead,.what,footer,figcaption{color:var(--muted)}
.what,figcaption,footer{font-size:.86rem}
a{color:var(--link);overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85em}
.top{display:flex;flex-wrap:wrap;gap:.5rem 2rem;justify-content:space-between;align-items:flex-start}
fieldset{border:1px solid var(--rule);border-radius:6px;margin:0;padding:.1rem .5rem;display:flex;gap:.8rem;font-size:.8rem;
color:var(--muted)}
legend{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
fieldset label{display:inline-flex;align-items:center;gap:.3rem;min-height:1.7rem;cursor:pointer}
fieldset input{margin:0;accent-color:var(--link)}
nav{font-size:.86rem;margin:.75rem 0 0}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:0;padding:0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:1px;background:var(--rule);
border:1px solid var(--rule);border-radius:6px;overflow:hidden;margin:1.25rem 0 0}
dl.facts div{background:var(--bg);padding:.55rem .8rem}
dl.facts dt{font-size:.78rem;color:var(--muted)}
dl.facts dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dl.facts small{display:block;font-size:.78rem;font-weight:400;color:var(--muted)}
.findings{list-style:none;margin:.6rem 0 0;padding:0}
.findings li{display:grid;grid-template-columns:6.2rem minmax(0,1fr);gap:.2rem .8rem;padding:.45rem 0;
border-bottom:1px solid var(--rule);overflow-wrap:anywhere}
.findings li:last-child{border-bottom:0}
.findings b{font-weight:600;font-size:.86rem;line-height:1.7}
.warning b{color:var(--warning)}.overruled b{color:var(--overruled)}.note b{color:var(--note)}
.scroll{overflow-x:auto;max-width:100%;margin:.4rem 0 .2rem}
.tall{max-height:34rem;overflow-y:auto}
.tall thead th{position:sticky;top:0;background:var(--bg)}
.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
table.data{font-size:.88rem;min-width:60%}
.data th,.data td{padding:.35rem .9rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
.data th{font-weight:600}
.data thead th{font-size:.8rem;color:var(--muted);white-space:nowrap;vertical-align:bottom}
.data .r{text-align:right;white-space:nowrap}
.data tbody th{min-width:8rem}
.data .wide{min-width:13rem}
.data tbody th,.data td{max-width:26rem;overflow-wrap:anywhere}
.data tr.strong>*{border-top:2px solid var(--rule)}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem 2rem;align-items:start}
.maps.wide{grid-template-columns:minmax(0,1fr)}
figure{margin:.75rem 0 0;max-width:100%;min-width:0}
figcaption strong{color:var(--fg);font-weight:600;font-size:.92rem}
table.heat{font-size:.72rem;border-collapse:separate;border-spacing:1px}
.heat th{font-weight:400;color:var(--fg);white-space:nowrap}
.heat thead th{vertical-align:bottom;padding:.2rem 0}
.heat thead span{writing-mode:vertical-rl;transform:rotate(180deg);display:inline-block;max-height:12rem}
.heat tbody th{text-align:right;padding:0 .45rem 0 0;position:sticky;left:0;background:var(--bg)}
.heat td{min-width:2.1rem;height:1.45rem;padding:0 .2rem;text-align:center}
.heat .na{background:var(--panel);color:var(--muted)}
.scale{display:flex;align-items:center;gap:.45rem;font-size:.76rem;color:var(--muted);margin:.35rem 0 0}
.scale{white-space:nowrap}
.scale i{display:inline-block;width:.6rem;height:.8rem}
.scale span:nth-child(2){display:inline-flex}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.5rem 2rem}
svg{display:block;width:100%;height:auto;max-width:34rem}
svg text{fill:var(--muted);font-size:11px;font-family:inherit}
svg .grid{stroke:var(--rule);stroke-width:1;fill:none}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .thin{stroke:var(--thin);stroke-width:1;opacity:.7}
svg .merged{stroke:var(--fg);stroke-width:2.8}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.4rem;margin:.3rem 0 .6rem;padding:0;font-size:.84rem}
.legend li{display:inline-flex;align-items:center;gap:.45rem;overflow-wrap:anywhere;min-width:0}
.legend svg{width:28px;height:8px;flex:none}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:.8rem 1rem;margin:.5rem 0;
overflow:auto;max-height:32rem;line-height:1.45}
footer{margin-top:2.5rem;padding-top:1rem;padding-bottom:2rem;border-top:1px solid var(--rule)}
@media (max-width:34rem){main,header,footer{padding-left:1rem;padding-right:1rem}.findings li{grid-template-columns:1fr}
h1{font-size:1.35rem}svg text{font-size:14px}}
@media print{fieldset,nav{display:none}.scroll,.tall,pre{overflow:visible;max-height:none}}
"""


def style_sheet() -> str:
    """All of it, light by default, dark where the system or the reader asks for it."""
    light, dark = (_variables(theme(name)) for name in ("light", "dark"))
    light += "color-scheme:light"
    dark += "color-scheme:dark"
    themes = [
        f":root{{{light}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}",
        f":root:has(#light:checked){{{light}}}",
        f":root:has(#dark:checked){{{dark}}}",
    ]
    cells = [
        f".{side}{step}{{background:var(--{side}{step});color:var(--{side}{step}t)}}"
        for side in "pn"
        for step in range(STEPS + 1)
    ]
    lines = [f".l{index}{{stroke:var(--l{index})}}" for index in range(LINES)]
    return "\n".join([*themes, _RULES.strip(), *cells, *lines])


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())
