// The pieces that views are made of: signs, states, the ceiling, tables, dialogs' plans. Every state is a sign and a word.
import { html } from '../vendor/preact.js';
import { clock, num, percent, plain } from './format.js';
import { to } from './route.js';
import { now } from './store.js';

// Strokes on a grid of 16.
const SIGNS = {
  sent: ['M8 1.8a6.2 6.2 0 1 0 0 12.4A6.2 6.2 0 0 0 8 1.8z', 'M5.3 8.2l1.9 1.9 3.6-4'],
  retry: ['M12.8 9.2A5 5 0 1 1 11.5 4.4', 'M13 1.9v2.9h-2.9'],
  dead: ['M4.2 4.2l7.6 7.6', 'M11.8 4.2l-7.6 7.6'],
  reject: ['M8 2.4a5.6 5.6 0 1 0 0 11.2A5.6 5.6 0 0 0 8 2.4z', 'M4.1 11.9l7.8-7.8'],
  twice: ['M2.5 5.5h7.5v7.5h-7.5z', 'M5.5 5.5v-2.5h7.5v7.5h-2.5'],
  pending: ['M8 2.5a5.5 5.5 0 1 0 0 11A5.5 5.5 0 0 0 8 2.5z'],
  go: ['M2 8h11.5', 'M9.5 4l4 4-4 4'],
  ok: ['M2.8 8.5l3.4 3.4L13.2 4.6'],
  pause: ['M5.5 3.5v9', 'M10.5 3.5v9'],
  clock: ['M8 2.2a5.8 5.8 0 1 0 0 11.6A5.8 5.8 0 0 0 8 2.2z', 'M8 4.8V8l2.2 1.5'],
  stop: ['M5.4 1.8h5.2l3.6 3.6v5.2l-3.6 3.6H5.4L1.8 10.6V5.4z', 'M5.4 8h5.2'],
  alarm: ['M5.4 1.8h5.2l3.6 3.6v5.2l-3.6 3.6H5.4L1.8 10.6V5.4z', 'M8 4.8v3.7', 'M8 11v.1'],
  warn: ['M8 2l6.4 11.5H1.6z', 'M8 6.3v3.2', 'M8 11.4v.1'],
  closed: ['M4.8 8h6.4', 'M3.3 6.7a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z', 'M12.7 6.7a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z'],
  open: ['M4.4 9.2l5.8-5.8', 'M3.3 8.7a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z', 'M12.7 8.7a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z'],
  half: ['M4.7 8.9l5.9-2.7', 'M3.3 7.9a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z', 'M12.7 7.9a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z'],
  tip: ['M8 1.8a4.3 4.3 0 0 0-2.4 7.8c.5.4.7.9.7 1.5h3.4c0-.6.2-1.1.7-1.5A4.3 4.3 0 0 0 8 1.8z', 'M6.5 13.7h3'],
  file: ['M3.5 1.8h6l3 3v9.4h-9z', 'M9.3 1.8V5h3.2'],
  flow: ['M1.5 5.5h4v5h-4z', 'M10.5 5.5h4v5h-4z', 'M5.5 8h5'],
  receipt: ['M3 2.2h10v11.6l-2.5-1.5L8 13.8l-2.5-1.5L3 13.8z', 'M5.5 6h5', 'M5.5 9h5'],
  bell: ['M4 11V7a4 4 0 0 1 8 0v4l1.2 1.5H2.8z', 'M6.7 14.2h2.6'],
  book: ['M3 2.5h8.5v11H3z', 'M5.5 6h4', 'M5.5 8.7h4', 'M13 4v9.5'],
  more: ['M3.5 8h.1', 'M8 8h.1', 'M12.5 8h.1'],
  find: ['M7 2.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9z', 'M10.4 10.4L14 14'],
  sun: ['M8 5.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6z', 'M8 1.5v1.5M8 13v1.5M1.5 8H3M13 8h1.5M3.4 3.4l1 1M11.6 11.6l1 1M12.6 3.4l-1 1M4.4 11.6l-1 1'],
  moon: ['M13.4 9.7A5.9 5.9 0 0 1 6.3 2.6a5.9 5.9 0 1 0 7.1 7.1z'],
  horn: ['M1.5 9.3c3 0 4.6-1 6-2.4', 'M15 3.5v9c-2.5-1-4.2-2-7.2-2', 'M7.3 6.3a2.7 2.7 0 1 0 0 5.4 2.7 2.7 0 0 0 0-5.4z'],
};
export function Icon({ name, tone = '' }) {
  const paths = SIGNS[name] ?? SIGNS.pending;
  return html`<svg class=${`i ${tone && `c-${tone}`} ${name === 'pending' ? 'dashed' : ''}`} viewBox="0 0 16 16" aria-hidden="true">
    ${paths.map((d, index) => html`<path d=${d} class=${name === 'sent' && index === 0 ? 'disc' : ''} />`)}
  </svg>`;
}

// A word of the daemon, its sign and its colour.
const STATES = {
  sent: ['sent', 'sent'], delivered: ['sent', 'ok'], accepted: ['pending', ''], pending: ['pending', ''], retrying: ['retry', 'retry'],
  dead: ['dead', 'dead'], failed: ['dead', 'dead'], rejected: ['reject', 'reject'], duplicate: ['twice', 'dup'], duplicates: ['twice', 'dup'],
  unsent: ['clock', ''], cancelled: ['stop', ''], expired: ['clock', 'retry'],
  reading: ['go', 'sent'], sending: ['go', 'sent'], held: ['pause', 'retry'], waiting: ['clock', ''], done: ['ok', 'ok'],
  enabled: ['go', 'ok'], paused: ['pause', 'retry'], disabled: ['pause', 'retry'], blocked: ['stop', 'dead'], 'not configured': ['pending', ''],
  closed: ['closed', 'ok'], open: ['open', 'dead'], 'half-open': ['half', 'retry'], idle: ['pending', ''],
  critical: ['alarm', 'dead'], warning: ['warn', 'retry'],
};
export function State({ is, word = is }) {
  const [sign, tone] = STATES[is] ?? ['pending', ''];
  return html`<span class="st"><${Icon} name=${sign} tone=${tone} />${word}</span>`;
}
export const toneOf = (state) => STATES[state]?.[1] ?? '';
export const signOf = (state) => STATES[state]?.[0] ?? 'pending';

// The ceiling looks the same wherever it stands.
export const Why = ({ ceiling, title }) =>
  ceiling ? html`<span class="why" title=${title ?? plain(ceiling.text)}>${plain(ceiling.text)}</span>` : html`<span class="dim">no ceiling known</span>`;

// With since when, and what would lift it.
export const Because = ({ ceiling, of }) => html`Ceiling: <${Why} ceiling=${ceiling} />${of && html` of <a href=${to('destinations', of)}>${plain(of)}</a>`}${ceiling.since && ` since ${clock(ceiling.since, now())}`}${ceiling.remedy && `; ${plain(ceiling.remedy)}`}. `;

// Text that people outside wrote: a file's name, a recipient, an answer.
export const Foreign = ({ text, mono }) => html`<bdi class=${mono ? 'mono' : ''}>${plain(text)}</bdi>`;

// The same, word for word, where it is kept.
export const Quoted = ({ text, isWhole = true }) => (text ? html`<code><${Foreign} text=${text} /></code>${isWhole ? '' : ' … (cut)'}` : html`<span class="dim">not kept</span>`);

export function Progress({ value, all, label }) {
  const part = all > 0 ? Math.min(1, value / all) : 0;
  return html`<span class="prog"><span class="bar" role="img" aria-label=${`${label} ${percent(value, all)}`}><i style=${{ width: `${part * 100}%` }}></i></span><b aria-hidden="true">${percent(value, all)}</b></span>`;
}

export const Section = ({ title, note, aside, id, children }) => html`<section aria-label=${title} id=${id}>
  <div class="sh"><h2>${title}</h2>${note != null && html`<span class="dim">${note}</span>`}${aside && html`<span class="r">${aside}</span>`}</div>
  ${children}
</section>`;

// A table that stays one where a phone lays it out as a list: the roles are said, because `display` takes them away.
// Columns: `[title, class]`. Rows: `<${Row}>` of `<${Cell}>`.
export const Table = ({ caption, columns, rows, children, cls = '', host, style }) => html`<table class=${`t ${cls}`} role="table" aria-rowcount=${rows}>
  <caption class="vh">${caption}</caption>
  <thead role="rowgroup"><tr role="row">${columns.map(([title, type = '']) => html`<th role="columnheader" scope="col" class=${type}>${title}</th>`)}</tr></thead>
  <tbody role="rowgroup" ref=${host} style=${style}>${children}</tbody>
</table>`;
export const Row = ({ cls = '', children, ...rest }) => html`<tr role="row" class=${`row ${cls}`} ...${rest}>${children}</tr>`;
export const Cell = ({ cls = '', label, children, ...rest }) => html`<td role="cell" class=${cls} data-l=${label} ...${rest}>${children}</td>`;

export const None = ({ children }) => html`<p class="none">${children}</p>`;
export const Trouble = ({ error, again }) =>
  error && html`<p class="none" role="alert"><${Icon} name="warn" tone="retry" /> ${plain(error.message)}. ${again && html`<button class="lk" onClick=${again}>Try again</button>`}</p>`;
export const Loading = () => html`<p class="none dim" aria-busy="true">Asking the daemon…</p>`;

// What was asked for: on its way, refused, nothing, or there; `children` draws it.
export const Asked = ({ asked: { data, error, again }, none = 'None.', children }) => html`<${Trouble} error=${error} again=${again} />${
  data ? (data.items.length ? children(data) : html`<${None}>${none}<//>`) : !error && html`<${Loading} />`}`;

// What a cut list covers and what it leaves out. Never silent.
export const Cut = ({ shown, total, atLeast, what, children }) => html`<div class="foot">
  <span>Showing ${num(shown)} of ${total == null ? 'an unknown number of' : `${atLeast ? 'at least ' : ''}${num(total)}`} ${what}.</span>${children}
</div>`;
