// Audit: who ordered what.
import { query } from '../lib/api.js';
import { clock, plain } from '../lib/format.js';
import { html, useEffect, useState } from '../vendor/preact.js';
import { now, useAsk } from '../lib/store.js';
import { Asked, Cell, Foreign, Row, Table } from '../lib/ui.js';

const COLUMNS = [['When'], ['Who'], ['Order'], ['Of'], ['What changed']];

export const AuditTable = ({ lines }) => html`<${Table} caption="Audit, the latest first" cls="t-audit" columns=${COLUMNS} rows=${lines.length + 1}>
  ${lines.map((line) => html`<${Row} key=${`${line.at} ${line.of} ${line.order}`}>
    <${Cell} title=${line.at}>${clock(line.at, now())}<//><${Cell}>${plain(line.by)}<//><${Cell}><b>${plain(line.order)}</b><//><${Cell}><${Foreign} text=${line.of} /><//><${Cell} cls="rest"><${Foreign} text=${line.detail} /><//>
  <//>`)}<//>`;

const STEP = 200;
export function Audit({ values }) {
  const [typed, setTyped] = useState(values.of ?? '');
  const [of, setOf] = useState(typed);
  const [limit, setLimit] = useState(STEP);
  useEffect(() => { const timer = setTimeout(() => setOf(typed), 250); return () => clearTimeout(timer); }, [typed]);
  const asked = useAsk(`/audit${query({ of, limit })}`, 5_000);
  return html`<section aria-label="Audit"><div class="hd"><div><h1>Audit</h1><p class="meta">Every order that changed something, the latest first.</p></div></div>
    <div class="filters"><label>About (a file, a destination, a filter)<input type="text" value=${typed} spellcheck=${false} onInput=${(event) => setTyped(event.target.value)} /></label></div>
    <${Asked} asked=${asked} none=${of ? 'No order is about that.' : 'Nobody has ordered anything yet.'}>${({ items }) => html`<${AuditTable} lines=${items} />
      <div class="foot"><span>Showing the ${items.length} latest${items.length === limit ? '; there may be more' : ', which is all of them'}.</span>${items.length === limit && limit < 1000 && html`<button class="btn sm r" onClick=${() => setLimit(Math.min(1000, limit + STEP))}>Show ${Math.min(STEP, 1000 - limit)} more</button>`}</div>`}<//>
  </section>`;
}
