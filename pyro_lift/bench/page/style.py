"""The page's style sheet."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--ink:#1b1f24;--soft:#5c6670;--faint:#d9dee3;--ground:#fff;--raised:#f5f7f9;--ours:#0072b2;--good:#00704f;
--bad:#b3420a;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b5588c;--c4:#c98a00;--c5:#3f9fd6;--c6:#1b1f24;--c7:#8a939c}
@media (prefers-color-scheme:dark){:root{--ink:#e7ebef;--soft:#a2adb8;--faint:#38414a;--ground:#14181c;--raised:#1d2329;
--ours:#5fb4ec;--good:#4fd0a0;--bad:#ff9d63;--c0:#5fb4ec;--c1:#ff8c42;--c2:#35c79a;--c3:#e08cba;--c4:#f0b843;
--c5:#9ad2f5;--c6:#e7ebef;--c7:#87929d}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 80px}
h1{font-size:2rem;line-height:1.2;margin:.4em 0 .2em}
h2{font-size:1.35rem;margin:2.2em 0 .5em;padding-top:.5em;border-top:1px solid var(--faint)}
h3{font-size:1.05rem;margin:1.8em 0 .4em}
p,li{max-width:75ch}
ul{padding-left:1.2em}
a{color:var(--ours)}
code{background:var(--raised);padding:.1em .3em;border-radius:3px;overflow-wrap:anywhere}
.lead{font-size:1.05rem}
.small,figcaption{font-size:.85rem;color:var(--soft)}
.warn{background:var(--raised);border-left:4px solid var(--bad);padding:.5em .8em}
.scroll{overflow-x:auto;margin:.6em 0}
table{border-collapse:collapse;font-size:.85rem;line-height:1.35;font-variant-numeric:tabular-nums}
th,td{padding:.35em .7em;text-align:right;white-space:nowrap;border-bottom:1px solid var(--faint);vertical-align:top}
thead th{white-space:normal;color:var(--soft);font-weight:600;vertical-align:bottom;min-width:4.5em}
th:first-child{text-align:left;position:sticky;left:0;background:var(--ground);font-weight:500}
tr.ours th,text.ours{color:var(--ours);fill:var(--ours);font-weight:650}
tr.ours td{background:var(--raised)}
tr.added th::after{content:" +";color:var(--soft)}
.theirs{color:var(--soft)}
.good{color:var(--good)}
.bad{color:var(--bad)}
figure{margin:.8em 0;overflow-x:auto}
figure.many{display:flex;flex-wrap:wrap;gap:14px}
figure.many figcaption{flex-basis:100%}
svg{width:100%;min-width:620px;height:auto;font-size:12px;font-family:inherit}
figure.many svg{width:176px;min-width:0}
svg text{fill:var(--ink)}
svg text.small{fill:var(--soft);font-size:11px}
svg text.ours{fill:var(--ours)}
svg line{stroke:var(--soft)}
svg line.grid{stroke:var(--faint)}
svg line.thin{stroke:var(--soft);stroke-width:.8}
svg line.strong{stroke:var(--ink);stroke-width:3}
svg line.dashed{stroke:var(--soft);stroke-dasharray:4 3}
svg .line{fill:none;stroke-width:1.8}
svg line.bar{stroke-width:2}
"""
STYLE += "".join(f"svg .c{k}{{stroke:var(--c{k})}}svg .dot.c{k}{{fill:var(--c{k});stroke:none}}\n" for k in range(8))
STYLE += """
details{margin:.8em 0}
summary{cursor:pointer;color:var(--ours)}
@media (max-width:640px){main{padding:12px 12px 60px}h1{font-size:1.5rem}th,td{padding:.3em .5em}
th:first-child{white-space:normal;max-width:9.5em}}
@media print{body{font-size:12px}}
"""
