// Files: what is in flight now, and all there ever were.
import { by, clock, count, duration, num, plain, rate } from '../lib/format.js';
import { usePages, useWindow } from '../lib/list.js';
import { html, useEffect, useState } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now, state, useLive } from '../lib/store.js';
import { Cell, Cut, Foreign, Loading, None, Progress, Row, State, Table, Trouble, Why } from '../lib/ui.js';
import { operable, release, why } from '../lib/verbs.js';

export const HEIGHTS = { wide: 64, narrow: 132 };
const COLUMNS = [['File'], ['State'], ['Progress'], ['Sent', 'num'], ['Rows', 'num opt'], ['Rate', 'num opt'], ['Time left', 'num'], ['Done at', 'num'], ['Why', 'vh']];
const isOpen = (file) => !['done', 'failed'].includes(file.state);

function doneAt(file) {
  if (file.settled_at) return clock(file.settled_at, now());
  if (file.done_at) return by(file.done_at, now());
  return { held: 'when released', waiting: 'when open' }[file.state] ?? '–';
}

// What became of a settled file, in words: only what there is.
export function became(file) {
  const parts = ['sent', 'dead', 'unsent', 'cancelled', 'rejected', 'duplicates'].filter((key) => file[key] > 0).map((key) => `${num(file[key])} ${key}`);
  return parts.join(', ') || 'no rows';
}

function Because({ file }) {
  if (file.state === 'done') return html`<span class="dim">${became(file)}. Took ${duration(file.took_s)}.</span>`;
  if (file.reason) return html`<span class="why" title=${plain(file.reason)}>${plain(file.reason)}</span>${file.since && html`<span class="dim"> since ${clock(file.since, now())}</span>`}`;
  if (file.ceiling) return html`<${Why} ceiling=${file.ceiling} />${file.ceiling.since && html`<span class="dim"> since ${clock(file.ceiling.since, now())}</span>`}`;
  return html`<span class="dim">to ${plain(file.to?.join(', '))}</span>`;
}

export function FileRow({ file, index }) {
  const settled = file.sent + file.dead + file.unsent + file.cancelled;
  const name = file.id ? html`<a class="name" href=${to('files', file.id)} title=${plain(file.name)}><${Foreign} text=${file.name} /></a>` : html`<span class="name" tabindex="-1"><${Foreign} text=${file.name} /></span>`;
  return html`<${Row} cls=${isOpen(file) ? '' : 'settled'} aria-rowindex=${index}>
    <${Cell} cls="what">${name}<//>
    <${Cell}><${State} is=${file.state} /><//>
    <${Cell}><${Progress} value=${settled} all=${settled + (file.open ?? 0)} label=${plain(file.name)} /><//>
    <${Cell} cls="num" label="Sent">${num(file.sent)}<//>
    <${Cell} cls="num opt" label="Rows">${num(file.rows)}${file.rows_final ? '' : '+'}<//>
    <${Cell} cls="num opt">${isOpen(file) ? rate(file.sent_per_s) : ''}<//>
    <${Cell} cls="num" label="Time left">${isOpen(file) ? duration(file.left_s) : ''}<//>
    <${Cell} cls="num" label=${isOpen(file) ? 'Done at' : 'Settled'}>${doneAt(file)}<//>
    <${Cell} cls="because-row"><${Because} file=${file} />
      ${file.state === 'held' && file.id && html`<button class="lk" disabled=${!operable()} title=${why()} onClick=${() => release(file)}>Release…</button>`}<//>
  <//>`;
}

export const FileTable = ({ caption, files, rows = files.length, from = 0, style, host }) => html`<${Table} caption=${caption} cls="t-files" columns=${COLUMNS} rows=${rows + 1} host=${host} style=${style}>
  ${files.map((file, i) => html`<${FileRow} file=${file} index=${from + i + 2} key=${file.id ?? `${file.feed}/${file.name}`} />`)}<//>`;

const STATES = [['', 'All files'], ['open', 'In flight'], ['reading', 'Reading'], ['sending', 'Sending'], ['held', 'Held'], ['waiting', 'Waiting'], ['done', 'Done'], ['failed', 'Failed']];
const SORTS = [['newest', 'Newest first'], ['oldest', 'Oldest first'], ['name', 'By name'], ['rows', 'Most rows first'], ['left', 'Most time left first']];
const PAGE = 500;

export function Files({ values }) {
  const live = useLive();
  const [filter, setFilter] = useState({ state: values.state ?? '', sort: 'newest', q: values.q ?? '', feed: '', destination: '' });
  const [typed, setTyped] = useState(filter.q);
  const pages = usePages('/files', { ...filter, limit: PAGE });
  useEffect(() => { const timer = setTimeout(() => setFilter((old) => (old.q === typed ? old : { ...old, q: typed })), 250); return () => clearTimeout(timer); }, [typed]);
  // What events say of an open file is newer than what the list said.
  const items = pages.items.map((file) => live.files.get(file.id) ?? file);
  const { from, to: end, style, host } = useWindow(items.length, HEIGHTS);
  useEffect(() => { if (end > items.length - 50) pages.more(); }, [end, items.length]);
  const listed = new Set(pages.items.map((file) => file.id));
  const fresh = (live.openFiles ?? []).filter((file) => file.id && !listed.has(file.id)).length;
  const isPlain = !filter.q && !filter.state && !filter.destination && filter.sort === 'newest';
  const files = state.overview?.files;
  const pick = (key) => (event) => setFilter((old) => ({ ...old, [key]: event.target.value }));
  return html`<section aria-label="Files">
    <div class="hd"><div><h1>Files</h1><p class="meta">${files ? `${count(files.reading + files.sending, 'file is', 'files are')} on the way, ${num(files.held)} held, ${num(files.waiting)} waiting, ${num(files.done)} done, ${num(files.failed)} failed` : ' '}</p></div></div>
    <div class="filters">
      <label>Name contains<input name="q" type="text" value=${typed} spellcheck=${false} onInput=${(event) => setTyped(event.target.value)} /></label>
      <label>State<select class=${filter.state ? 'on' : ''} value=${filter.state} onChange=${pick('state')}>${STATES.map(([value, word]) => html`<option value=${value}>${word}</option>`)}</select></label>
      <label>Destination<select class=${filter.destination ? 'on' : ''} value=${filter.destination} onChange=${pick('destination')}><option value="">All</option>${live.destinations.map(({ name }) => html`<option value=${name}>${name}</option>`)}</select></label>
      <label>Order<select value=${filter.sort} onChange=${pick('sort')}>${SORTS.map(([value, word]) => html`<option value=${value}>${word}</option>`)}</select></label>
    </div>
    <p class="fresh" role="status">${isPlain && fresh > 0 && html`<button class="btn sm" onClick=${pages.again}>${count(fresh, 'new file')}: show</button>`}</p>
    <${Trouble} error=${pages.error} again=${pages.again} />
    ${items.length === 0 && !pages.error ? (pages.isLoading ? html`<${Loading} />` : html`<${None}>${isPlain ? 'Nothing was dropped yet.' : 'No file matches.'}<//>`)
      : html`<${FileTable} caption="Files" files=${items.slice(from, end)} rows=${pages.total ?? items.length} from=${from} style=${style} host=${host} />`}
    <${Cut} shown=${items.length} total=${pages.total} atLeast=${pages.cut} what=${`files${pages.cut ? '; only the 10,000 latest are looked through' : ''}`}>
      ${pages.next && html`<button class="btn sm r" onClick=${pages.more} disabled=${pages.isLoading}>${pages.isLoading ? 'Asking…' : `Show ${num(Math.min(PAGE, (pages.total ?? Infinity) - items.length))} more`}</button>`}
    <//>
  </section>`;
}
