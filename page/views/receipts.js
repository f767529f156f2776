// Receipts: what came back, what waits for its message, and what never came.
import { clock, duration, num, plain } from '../lib/format.js';
import { html } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now, useAsk } from '../lib/store.js';
import { Asked, Cell, Foreign, Loading, None, Quoted, Row, Section, State, Table, Trouble } from '../lib/ui.js';

const LIMIT = 100;
const SOURCES = [['Source'], ['Destination'], ['Last receipts'], ['Cursor moved'], ['Waiting', 'num'], ['Parked', 'num']];
const HELD = [['Since'], ['Source'], ['Destination'], ['State'], ['Names']];
const REJECTS = [['When'], ['Source'], ['Place'], ['Reason'], ['Text']];
const COUNTS = [['Destination'], ['State'], ['Messages', 'num']];
const GAPS = [['Destination'], ['Sent longer ago than'], ['Messages', 'num']];

// A list of receipts that are in no file's counts.
function Listed({ title, note, path, columns, children }) {
  return html`<${Section} title=${title} note=${note}><${Asked} asked=${useAsk(`/receipts/${path}?limit=${LIMIT}`, 10_000)}>${({ items }) => html`<${Table} caption=${title} cls="t-held" columns=${columns} rows=${items.length + 1}>${items.map(children)}<//>
    <div class="foot"><span>Showing ${items.length === LIMIT ? `${LIMIT}; there may be more` : `all ${items.length}`}.</span></div>`}<//><//>`;
}
const held = (it) => html`<${Row}><${Cell} label="Since" title=${it.since}>${clock(it.since, now())}<//><${Cell} label="Source">${plain(it.source)}<//><${Cell} label="Destination">${plain(it.destination)}<//><${Cell} label="State"><${State} is=${it.state} /><//><${Cell} cls="rest"><${Foreign} text=${it.names} mono /><//><//>`;
const rejected = (it) => html`<${Row}><${Cell} label="When" title=${it.at}>${clock(it.at, now())}<//><${Cell} label="Source">${plain(it.source)}<//><${Cell} label="Place"><${Foreign} text=${it.place} /><//><${Cell} label="Reason">${plain(it.reason)}<//><${Cell} cls="rest"><${Quoted} text=${it.text} isWhole=${it.is_whole} /><//><//>`;

export function Receipts() {
  const { data, error, again } = useAsk('/receipts', 5_000);
  if (!data) return html`<section aria-label="Receipts"><h1>Receipts</h1>${error ? html`<${Trouble} error=${error} again=${again} />` : html`<${Loading} />`}</section>`;
  if (!data.kept) return html`<section aria-label="Receipts"><h1>No receipts are kept.</h1><p class="because flat">They need a ledger of rows: <span class="why">ledger.kind = "postgres"</span>, or a source under <span class="why">[receipts.sources.NAME]</span>. What was sent is under <a href=${to('files')}>Files</a>.</p></section>`;
  const waiting = data.sources.reduce((sum, it) => sum + it.waiting, 0);
  const gaps = data.gaps.flatMap((gap) => gap.ages.map((age) => ({ ...age, destination: gap.destination })));
  return html`<section aria-label="Receipts"><h1>${waiting ? `${num(waiting)} receipts wait to be joined.` : 'Every receipt that came is joined.'}</h1></section>
    <${Trouble} error=${error} again=${again} />
    <${Section} title="Sources"><${Table} caption="Sources" cls="t-sources" columns=${SOURCES} rows=${data.sources.length + 1}>${data.sources.map((it) => html`<${Row} key=${it.name}><${Cell} cls="what"><b class="name">${plain(it.name)}</b><//><${Cell} label="Destination">${plain(it.destination)}<//><${Cell} label="Last receipts">${clock(it.receipts_at, now())}<//><${Cell} label="Cursor moved">${clock(it.cursor_at, now())}<//><${Cell} cls="num" label="Waiting">${num(it.waiting)}<//><${Cell} cls="num" label="Parked">${num(it.parked)}<//><//>`)}<//><//>
    <div class="two"><${Section} title="Messages by state">${data.counts == null ? html`<${None}>Not counted over all files, because that would read every row; each file has its own counts.<//>` : html`<${Table} caption="Messages by state" cls="t-three" columns=${COUNTS} rows=${data.counts.length + 1}>${data.counts.map((it) => html`<${Row}><${Cell}>${plain(it.destination)}<//><${Cell}><${State} is=${it.state} /><//><${Cell} cls="num">${num(it.messages)}<//><//>`)}<//>`}<//>
    <${Section} title="Sent, and no final receipt">${gaps.length === 0 ? html`<${None}>None.<//>` : html`<${Table} caption="Sent, and no final receipt" cls="t-three" columns=${GAPS} rows=${gaps.length + 1}>${gaps.map((it) => html`<${Row}><${Cell}>${plain(it.destination)}<//><${Cell}>${duration(it.from_s)}<//><${Cell} cls="num">${num(it.messages)}<//><//>`)}<//>`}<//></div>
    <${Listed} title="Parked" note="their message is not known yet" path="parked" columns=${HELD}>${held}<//>
    <${Listed} title="Orphans" note="no message ever came" path="orphans" columns=${HELD}>${held}<//>
    <${Listed} title="Rejected" note="could not be read" path="rejects" columns=${REJECTS}>${rejected}<//>`;
}
