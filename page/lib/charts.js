// Charts over the last 15 minutes: one time axis, one crosshair for all that stand together. uPlot draws on a canvas, which
// nobody can read aloud, so each chart is also a slider over its samples whose value is the sample in words.
import uPlot from '../vendor/uplot.js';
import { html, useEffect, useLayoutEffect, useRef, useState } from './preact.js';
import { DASH, clock, num } from './format.js';
import { now, useLive } from './store.js';

const HEIGHT = 164;
const SPAN_S = 15 * 60;

// Colours of the style sheet, as a canvas takes them.
const probe = document.createElement('span');
probe.hidden = true;
document.documentElement.append(probe);
const colour = (name) => {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
};
function hatch(tone) {
  const tile = document.createElement('canvas');
  tile.width = tile.height = 8;
  const pen = tile.getContext('2d');
  pen.strokeStyle = colour(tone);
  pen.beginPath();
  for (const x of [-8, 0, 8]) { pen.moveTo(x, 8); pen.lineTo(x + 8, 0); }
  pen.stroke();
  return pen.createPattern(tile, 'repeat');
}

// The crosshair of charts that stand together; `null` means the last sample.
const cross = new Map();
function useCross(group) {
  const [, draw] = useState(0);
  useEffect(() => {
    const entry = cross.get(group) ?? { at: null, draws: new Set() };
    cross.set(group, entry);
    const mine = () => draw((n) => n + 1);
    entry.draws.add(mine);
    return () => entry.draws.delete(mine);
  }, [group]);
  return [cross.get(group)?.at ?? null, (at) => {
    const entry = cross.get(group);
    if (!entry || entry.at === at) return;
    entry.at = at;
    entry.draws.forEach((mine) => mine());
  }];
}

const sum = (rows) => rows[0].map((_, index) => rows.reduce((total, row) => total + (row[index] ?? 0), 0));
// A top of the axis that doesn't jump with each sample: 1, 2 or 5 times a power of ten.
function top(values, least) {
  const most = Math.max(least, ...values.filter((value) => value != null));
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= most * 1.02) ?? most * 1.1;
}

// What is drawn: lines `{label, tone, values, area, dash}`, or `stacked` bars of the same; `limit` a level with its words.
function options(spec, width, gap) {
  const size = { font: '11px system-ui, sans-serif', ticks: { show: false }, stroke: () => colour('ink3') };
  const series = spec.lines.map(({ label, tone, area, dash }) => ({
    label,
    stroke: () => colour(tone),
    width: spec.stacked ? 0 : 1.6,
    dash,
    fill: spec.stacked ? () => colour(tone) : area && (() => colour(`${tone}-bg`)),
    paths: spec.stacked ? uPlot.paths.bars({ size: [0.8, 12], align: 0 }) : undefined,
    points: { show: false },
    spanGaps: false,
  }));
  return {
    width, height: HEIGHT, padding: [14, 0, 0, 0], legend: { show: false },
    cursor: { y: false, points: { show: false }, drag: { x: false, y: false }, x: true },
    scales: { x: { time: true, range: (_, from, until) => [(until ?? now() / 1000) - SPAN_S, until ?? now() / 1000] }, y: { range: () => [0, spec.top] } },
    axes: [
      { ...size, grid: { show: false }, size: 22, space: 64, values: (_, at) => at.map((s) => clock(s * 1000, s * 1000).slice(0, 5)) },
      { ...size, grid: { stroke: () => colour('line'), width: 1 }, size: 44, space: 44, values: (_, at) => at.map((v) => `${num(v)}${spec.suffix ?? ''}`) },
    ],
    series: [{}, ...series],
    hooks: {
      drawClear: [(u) => {
        // Where no answer came there is nothing to time: a hatch, not a zero.
        const pen = u.ctx;
        const { left, top: from, height, width: wide } = u.bbox;
        pen.save();
        pen.fillStyle = hatch('edge');
        for (const [a, b] of gap.current) {
          const x = Math.max(left, u.valToPos(a, 'x', true));
          pen.fillRect(x, from, Math.min(left + wide, u.valToPos(b, 'x', true)) - x, height);
        }
        pen.restore();
      }],
      draw: [(u) => {
        if (spec.limit == null || spec.limit > spec.top) return;
        const pen = u.ctx;
        const y = u.valToPos(spec.limit, 'y', true);
        pen.save();
        pen.strokeStyle = pen.fillStyle = colour('ink2');
        pen.setLineDash([4, 4]);
        pen.beginPath();
        pen.moveTo(u.bbox.left, y);
        pen.lineTo(u.bbox.left + u.bbox.width, y);
        pen.stroke();
        pen.textAlign = 'right';
        pen.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
        pen.fillText(spec.limitWords, u.bbox.left + u.bbox.width, y - 5 * devicePixelRatio);
        pen.restore();
      }],
    },
  };
}

function gapsOf(at, isGap) {
  const gaps = [];
  for (let i = 0; i < at.length; i += 1) {
    if (!isGap[i]) continue;
    const [from, to] = [i ? at[i - 1] : at[i], at[i]];
    if (gaps.length && gaps.at(-1)[1] === from) gaps.at(-1)[1] = to;
    else gaps.push([from, to]);
  }
  return gaps;
}

function Chart({ group, title, unit, value, spec, words, series }) {
  const host = useRef();
  const plot = useRef(null);
  const gap = useRef([]);
  const shown = useRef(spec);
  const [at, setAt] = useCross(group);
  const last = series.at.length - 1;
  const index = at == null ? last : Math.max(0, Math.min(last, at));
  const seconds = series.at.map((time) => Date.parse(time) / 1000);
  gap.current = gapsOf(seconds, spec.gap ?? []);
  Object.assign(shown.current, spec);
  const data = () => {
    const lines = spec.lines.map((line) => line.values);
    // Bars stand on one another: the one that is drawn first is the whole.
    const stacked = spec.stacked ? lines.map((_, i) => sum(lines.slice(i))) : lines;
    return [seconds, ...stacked];
  };
  useLayoutEffect(() => {
    const u = new uPlot(options(shown.current, host.current.clientWidth || 300, gap), data(), host.current);
    plot.current = u;
    const watch = new ResizeObserver(([entry]) => u.setSize({ width: Math.round(entry.contentRect.width), height: HEIGHT }));
    watch.observe(host.current);
    const move = () => { if (u.over.matches(':hover')) setAt(u.cursor.idx ?? null); };
    u.over.addEventListener('mousemove', move);
    u.over.addEventListener('mouseleave', () => setAt(null));
    const theme = () => u.redraw();
    addEventListener('postrider-theme', theme);
    return () => { watch.disconnect(); removeEventListener('postrider-theme', theme); u.destroy(); };
  }, [spec.lines.length]);
  useLayoutEffect(() => { plot.current?.setData(data()); }, [series.version, spec.top, spec.limit]);
  useLayoutEffect(() => {
    const u = plot.current;
    if (!u || u.over.matches(':hover')) return;
    u.setCursor(at == null || seconds[index] == null ? { left: -10, top: -10 } : { left: u.valToPos(seconds[index], 'x'), top: 0 });
  });
  const key = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageDown: -12, PageUp: 12, Home: -last, End: last }[event.key];
    if (step == null) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(last, index + step * (event.shiftKey ? 12 : 1)));
    setAt(next === last ? null : next);
  };
  const when = at == null ? 'now' : clock(series.at[index], now());
  return html`<figure>
    <div class="ch"><h3>${title}</h3><b>${index < 0 ? DASH : value(index)}</b></div>
    <div class="lg">${spec.lines.map(({ label, tone, dash }) => html`<span class=${`c-${tone}`}><s class=${spec.stacked ? 'sq' : dash ? 'd' : ''}></s><em>${label}</em></span>`)}<span class="u">${unit}, ${when}</span></div>
    <div class="chart" ref=${host} tabindex="0" role="slider" aria-label=${`${title}, last 15 minutes`} aria-valuemin="0" aria-valuemax=${Math.max(0, last)} aria-valuenow=${Math.max(0, index)}
      aria-valuetext=${index < 0 ? 'no samples yet' : `${when}: ${words(index)}`} onKeyDown=${key} onBlur=${() => setAt(null)}></div>
  </figure>`;
}

const Empty = ({ title }) => html`<figure><div class="ch"><h3>${title}</h3><b>${DASH}</b></div><div class="lg"></div><div class="chart none dim">No samples yet. They come every 5 s.</div></figure>`;
const at = (values, index, digits = 0) => (values[index] == null ? DASH : digits ? values[index].toFixed(digits) : num(values[index]));

export function Throughput({ group, series }) {
  if (!series?.at.length) return html`<${Empty} title="Throughput" />`;
  const sent = series.sent_per_s;
  const limit = series.rate_per_s ?? null;
  const spec = {
    lines: [{ label: 'sent', tone: 'sent', values: sent, area: true }],
    top: top([...sent, limit], 10), limit, limitWords: `rate_per_s = ${num(limit)}`,
  };
  return html`<${Chart} group=${group} title="Throughput" unit="messages/s" series=${series} spec=${spec} value=${(i) => at(sent, i)} words=${(i) => `${at(sent, i)} messages a second`} />`;
}

export function Latency({ group, series }) {
  if (!series?.at.length) return html`<${Empty} title="Latency" />`;
  const { p50_ms: p50, p95_ms: p95 } = series;
  const spec = {
    lines: [{ label: 'p50', tone: 'sent', values: p50 }, { label: 'p95', tone: 'ink2', values: p95, dash: [5, 3] }],
    top: top(p95, 20), gap: p95.map((value) => value == null),
  };
  const words = (i) => (p95[i] == null ? 'no answers' : `p50 ${at(p50, i)} ms, p95 ${at(p95, i)} ms`);
  return html`<${Chart} group=${group} title="Latency" unit="ms p95" series=${series} spec=${spec} value=${(i) => at(p95, i)} words=${words} />`;
}

const KINDS = [['5xx', 'dead', 'failed_5xx_per_s'], ['timeout', 'retry', 'failed_timeout_per_s'], ['4xx', 'reject', 'failed_4xx_per_s'], ['other', 'ink2', 'failed_other_per_s']];
export function Errors({ group, series }) {
  if (!series?.at.length) return html`<${Empty} title="Errors" />`;
  const all = series.attempts_per_s;
  const lines = KINDS.map(([label, tone, key]) => ({ label, tone, values: series[key].map((value, i) => (all[i] > 0 && value != null ? (value / all[i]) * 100 : null)) }));
  const failed = sum(lines.map((line) => line.values));
  // Never below 4 %, so that noise doesn't look like an incident.
  const most = Math.max(...failed);
  const spec = { lines, stacked: true, suffix: ' %', top: [4, 10, 25, 50, 100].find((step) => step >= most) ?? 100, gap: all.map((value) => value == null) };
  const value = (i) => (all[i] > 0 ? failed[i].toFixed(failed[i] >= 10 ? 0 : 1) : DASH);
  const words = (i) => (all[i] > 0 ? `${value(i)} % failed: ${lines.map((line) => `${line.label} ${at(line.values, i, 1)} %`).join(', ')}` : 'no attempts');
  return html`<${Chart} group=${group} title="Errors" unit="% of attempts" series=${series} spec=${spec} value=${value} words=${words} />`;
}

export function InFlight({ group, series }) {
  if (!series?.at.length) return html`<${Empty} title="Limit and in flight" />`;
  const { limit, in_flight: flight } = series;
  const spec = {
    lines: [{ label: 'limit', tone: 'ink2', values: limit, dash: [5, 3] }, { label: 'in flight', tone: 'sent', values: flight, area: true }],
    top: top([...limit, ...flight], 8),
  };
  return html`<${Chart} group=${group} title="Limit and in flight" unit="requests" series=${series} spec=${spec} value=${(i) => `${at(flight, i)} / ${at(limit, i)}`} words=${(i) => `${at(flight, i)} in flight of ${at(limit, i)}`} />`;
}

export function Charts({ destination, kinds }) {
  const { series } = useLive();
  return html`<div class="charts">${kinds.map((Kind) => html`<${Kind} group=${`d:${destination}`} series=${series.get(destination)} key=${Kind.name + destination} />`)}</div>`;
}
