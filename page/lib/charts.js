// Charts of the last 15 minutes, as SVG that stretches to its place: 900 seconds wide, 100 high. Charts that stand together share
// a crosshair. Nobody can read a drawing aloud, so each chart is also a slider over its samples, whose value is the sample in words.
import { html, useState } from '../vendor/preact.js';
import { DASH, clock, minute, num } from './format.js';
import { now, useLive } from './store.js';

const SPAN_S = 15 * 60;
const MARK_S = 5 * 60;

const isKnown = (value) => value != null;
const sum = (rows) => rows[0].map((_, index) => rows.reduce((total, row) => total + (row[index] ?? 0), 0));
// A top of the axis that doesn't jump with each sample: 1, 2 or 5 times a power of ten.
function top(values, least) {
  const most = Math.max(least, ...values.filter(isKnown)) * 1.02;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].find((step) => step * power >= most) * power;
}
// The ranges of indices where `is` holds.
const runs = (values, is) => values.reduce((found, value, i) => {
  if (is(value)) {
    if (found.at(-1)?.[1] === i - 1) found.at(-1)[1] = i;
    else found.push([i, i]);
  }
  return found;
}, []);

function Chart({ kind: { title, unit, stacked, suffix = '', of }, series, at, setAt }) {
  if (!series?.at.length) return html`<figure><div class="ch"><h3>${title}</h3><b>${DASH}</b></div><div class="lg"></div><div class="chart none dim">No samples yet. They come every 5 s.</div></figure>`;
  const { lines, most, limit, gap = [], value, words } = of(series);
  const times = series.at.map((time) => Date.parse(time) / 1000);
  const last = times.length - 1;
  const index = Math.min(last, at ?? last);
  const begin = times[last] - SPAN_S;
  const x = (i) => (times[i] - begin).toFixed(1);
  const y = (n) => (100 - (n / most) * 100).toFixed(2);
  // By transform, so that what moves with time moves nothing else.
  const stand = (time) => ({ '--x': ((time - begin) / SPAN_S) * 100 });
  const line = (values, isArea) => runs(values, isKnown).map(([from, to]) => `M${values.slice(from, to + 1).map((n, i) => `${x(from + i)} ${y(n)}`).join('L')}${isArea ? `V100H${x(from)}z` : 'h0'}`).join('');
  const bars = (values, below) => values.map((n, i) => (n > 0 ? `M${x(i) - 2} ${y(below[i])}h4V${y(below[i] + n)}h-4z` : '')).join('');
  const drawn = lines.map(({ tone, values, area, dash }, i) => (stacked
    ? html`<path class=${`c-${tone} bars`} d=${bars(values, i ? sum(lines.slice(0, i).map((other) => other.values)) : values.map(() => 0))} />`
    : html`${area && html`<path class=${`c-${tone} area`} d=${line(values, true)} />`}<path class=${`c-${tone} ${dash ? 'dash' : ''}`} d=${line(values)} />`));
  const marks = [1, 2, 3].map((n) => (Math.floor(begin / MARK_S) + n) * MARK_S).filter((time) => time - begin > 30 && time < times[last] - 30);
  const move = (event) => {
    const time = begin + (event.offsetX / event.currentTarget.clientWidth) * SPAN_S;
    setAt(Math.max(0, times.findLastIndex((one) => one < time + 2.5)));
  };
  const key = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageDown: -12, PageUp: 12, Home: -last, End: last }[event.key];
    if (step == null) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(last, index + step * (event.shiftKey ? 12 : 1)));
    setAt(next === last ? null : next);
  };
  const when = at == null ? 'now' : clock(series.at[index], now());
  return html`<figure>
    <div class="ch"><h3>${title}</h3><b>${value(index)}</b></div>
    <div class="lg">${lines.map(({ label, tone, dash }) => html`<span class=${`c-${tone}`}><s class=${stacked ? 'sq' : dash ? 'd' : ''}></s><em>${label}</em></span>`)}<span class="u">${unit}, ${when}</span></div>
    <div class="chart" tabindex="0" role="slider" aria-label=${`${title}, last 15 minutes`} aria-valuemin="0" aria-valuemax=${last} aria-valuenow=${index}
      aria-valuetext=${`${when}: ${words(index)}`} onKeyDown=${key} onBlur=${() => setAt(null)}>
      <div class="y">${[most, most / 2, 0].map((n) => html`<span>${num(n)}${suffix}</span>`)}</div>
      <div class="plot" onPointerMove=${move} onPointerLeave=${() => setAt(null)}>
        ${runs(gap, Boolean).map(([from, to]) => html`<i class="gap" style=${{ ...stand(times[Math.max(0, from - 1)]), width: `${((times[to] - times[Math.max(0, from - 1)]) / SPAN_S) * 100}%` }}></i>`)}
        <svg viewBox="0 0 900 100" preserveAspectRatio="none"><path class="grid" d="M0 0H900M0 50H900M0 100H900" />${drawn}${isKnown(limit) && html`<path class="c-ink2 dash" d=${`M0 ${y(limit)}H900`} />`}</svg>
        ${isKnown(limit) && html`<span class="lim" style=${{ '--y': (limit / most) * 100 }}>rate_per_s = ${num(limit)}</span>`}
        ${marks.map((time) => html`<span class="x" style=${stand(time)} key=${time}>${minute(time * 1000, time * 1000)}</span>`)}
        ${at != null && html`<i class="cross" style=${stand(times[index])}></i>`}
      </div>
    </div>
  </figure>`;
}

const at = (values, index, digits = 0) => (values[index] == null ? DASH : digits ? values[index].toFixed(digits) : num(values[index]));

export const Throughput = { title: 'Throughput', unit: 'messages/s', of: ({ sent_per_s: sent, rate_per_s: limit }) => ({
  lines: [{ label: 'sent', tone: 'sent', values: sent, area: true }], most: top([...sent, limit], 10), limit,
  value: (i) => at(sent, i), words: (i) => `${at(sent, i)} messages a second`,
}) };

export const Latency = { title: 'Latency', unit: 'ms p95', of: ({ p50_ms: p50, p95_ms: p95 }) => ({
  lines: [{ label: 'p50', tone: 'sent', values: p50 }, { label: 'p95', tone: 'ink2', values: p95, dash: true }],
  // Where no answer came there is nothing to time: a hatch, not a zero.
  most: top(p95, 20), gap: p95.map((value) => value == null),
  value: (i) => at(p95, i), words: (i) => (p95[i] == null ? 'no answers' : `p50 ${at(p50, i)} ms, p95 ${at(p95, i)} ms`),
}) };

const FAILED = [['5xx', 'dead', 'failed_5xx_per_s'], ['timeout', 'retry', 'failed_timeout_per_s'], ['4xx', 'reject', 'failed_4xx_per_s'], ['other', 'ink2', 'failed_other_per_s']];
export const Errors = { title: 'Errors', unit: '% of attempts', stacked: true, suffix: ' %', of: (series) => {
  const all = series.attempts_per_s;
  const lines = FAILED.map(([label, tone, key]) => ({ label, tone, values: series[key].map((value, i) => (all[i] > 0 && value != null ? (value / all[i]) * 100 : null)) }));
  const failed = sum(lines.map((line) => line.values));
  const value = (i) => (all[i] > 0 ? failed[i].toFixed(failed[i] >= 10 ? 0 : 1) : DASH);
  return {
    // Never below 4 %, so that noise doesn't look like an incident.
    lines, most: [4, 10, 20, 50].find((step) => step >= Math.max(...failed)) ?? 100, gap: all.map((value) => value == null),
    value, words: (i) => (all[i] > 0 ? `${value(i)} % failed: ${lines.map((line) => `${line.label} ${at(line.values, i, 1)} %`).join(', ')}` : 'no attempts'),
  };
} };

export const InFlight = { title: 'Limit and in flight', unit: 'requests', of: ({ limit, in_flight: flight }) => ({
  lines: [{ label: 'limit', tone: 'ink2', values: limit, dash: true }, { label: 'in flight', tone: 'sent', values: flight, area: true }], most: top([...limit, ...flight], 8),
  value: (i) => `${at(flight, i)} / ${at(limit, i)}`, words: (i) => `${at(flight, i)} in flight of ${at(limit, i)}`,
}) };

export function Charts({ destination, kinds }) {
  const { series } = useLive();
  const [at, setAt] = useState(null);
  return html`<div class="charts">${kinds.map((kind) => html`<${Chart} kind=${kind} series=${series.get(destination)} at=${at} setAt=${setAt} key=${kind.title} />`)}</div>`;
}
