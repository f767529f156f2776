// Dead letters: filter, see why, and send again all that match.
import { query } from '../lib/api.js';
import { clock, count, num, plain, shortId } from '../lib/format.js';
import { usePages } from '../lib/list.js';
import { html, useEffect, useState } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now, state, useAsk, useLive } from '../lib/store.js';
import { Cell, Foreign, Icon, Loading, Quoted, Row, Section, State, Table, Trouble } from '../lib/ui.js';
import { operable, redrive, why } from '../lib/verbs.js';

const FIELDS = ['file', 'destination', 'reason', 'status', 'cause', 'newer_than'];
const REASONS = ['status', 'timeout', 'connect', 'dns', 'tls', 'reset', 'protocol', 'render', 'panic', 'poison', 'refused', 'unavailable'];
const CAUSES = ['permanent', 'attempts', 'age', 'poison'];
const AGES = [['30m', '30 minutes'], ['2h', '2 hours'], ['1day', 'a day'], ['7days', '7 days']];
const PAGE = 100;

const GROUPS = [['Messages', 'num'], ['File'], ['Destination'], ['Last answer'], ['Cause'], ['Last', 'num'], ['First line of the answer']];
// `link` gives the address where a group is the filter.
export const GroupTable = ({ groups, total, link }) => {
  const most = Math.max(1, ...groups.map((group) => group.messages));
  return html`<${Table} caption="Groups of dead letters, the largest first" cls="t-groups" columns=${GROUPS} rows=${groups.length + 1}>
    ${groups.map((group) => html`<${Row} key=${`${group.file} ${group.destination} ${group.reason} ${group.status} ${group.cause}`}>
      <${Cell} cls="num" label="Messages"><b>${num(group.messages)}</b><span class="dist" aria-hidden="true"><i style=${{ width: `${(group.messages / most) * 100}%` }}></i></span><//>
      <${Cell} cls="what"><a class="name" href=${link(group)} title=${`Filter by this group of ${num(group.messages)} of ${num(total)}`}><${Foreign} text=${group.file_name} /></a><//>
      <${Cell} label="Destination">${plain(group.destination)}<//>
      <${Cell} label="Last answer"><${State} is="dead" word=${group.status ?? group.reason} /><//>
      <${Cell} label="Cause">${group.cause}<//>
      <${Cell} cls="num" label="Last">${clock(group.last_at, now())}<//>
      <${Cell} cls="rest"><${Quoted} text=${group.detail} /><//>
    <//>`)}<//>`;
};

const LETTERS = [['When'], ['Recipient'], ['Message'], ['Row', 'num'], ['Attempts', 'num'], ['Last answer'], ['First line of the answer']];
const Letter = ({ letter }) => html`<${Row}>
  <${Cell} label="When" title=${letter.at}>${clock(letter.at, now())}<//>
  <${Cell} cls="what"><a class="name small" href=${to('find', null, { id: letter.id })} title=${plain(letter.recipient)}><${Foreign} text=${letter.recipient ?? '(archived)'} /></a><//>
  <${Cell} cls="mono dim opt" title=${letter.id}>${shortId(letter.id)}<//>
  <${Cell} cls="num opt" label="Row">${num(letter.row)}<//>
  <${Cell} cls="num" label="Attempts">${num(letter.attempts)}<//>
  <${Cell} label="Last answer"><${State} is="dead" word=${letter.status ?? letter.reason} /><//>
  <${Cell} cls="rest"><${Quoted} text=${letter.detail} /><span class="dim"> · ${plain(letter.file_name)} to ${plain(letter.destination)}</span><//>
<//>`;

// What the filter says, in words.
function words(filter, fileName) {
  const said = FIELDS.filter((key) => filter[key]).map((key) => html`${key === 'newer_than' ? 'given up within' : key} <span class="why">${plain(key === 'file' ? fileName : filter[key])}</span> `);
  return said.length ? said : 'No filter: all dead letters.';
}

export function Dead({ values }) {
  useLive();
  const filter = Object.fromEntries(FIELDS.filter((key) => values[key]).map((key) => [key, values[key]]));
  const [turn, setTurn] = useState(0);
  const again = () => setTurn((n) => n + 1);
  const groups = useAsk(`/dead/groups${query({ ...filter })}`);
  const all = useAsk('/dead/groups');
  const letters = usePages('/dead', { ...filter, limit: PAGE }, turn);
  useEffect(() => { if (turn) { groups.again(); all.again(); } }, [turn]);
  const pick = (key) => (event) => { location.hash = to('dead', null, { ...filter, [key]: event.target.value }); };
  const found = groups.data;
  // Choices come from what there is; a choice that stands in the address is always among them.
  const choice = (key, value, label) => {
    const map = new Map((all.data?.groups ?? []).map((group) => [String(group[key] ?? ''), group]));
    if (filter[value]) map.has(filter[value]) || map.set(filter[value], null);
    return [...map].filter(([id]) => id).map(([id, group]) => html`<option value=${id} key=${id}>${plain(label ? (group ? label(group) : id) : id)}</option>`);
  };
  const fileName = all.data?.groups.find((group) => group.file === filter.file)?.file_name ?? filter.file;
  const select = (key, title, options) => html`<label>${title}<select name=${key} class=${filter[key] ? 'on' : ''} value=${filter[key] ?? ''} onChange=${pick(key)}><option value="">All</option>${options}</select></label>`;
  const isAll = Object.keys(filter).length === 0;
  const isNone = found?.total === 0;
  const atLeast = found?.cut ? 'at least ' : '';
  const title = all.data ? (all.data.total === 0 ? 'No dead letters.' : `${all.data.cut ? 'At least ' : ''}${count(all.data.total, 'dead letter')}`) : 'Dead letters';
  return html`<section aria-label="Dead letters"><div class="hd"><div><h1>${title}</h1><p class="meta">What Postrider gave up on, with the receiver’s last answer.</p></div></div>
    <div class="filters">
      ${select('file', 'File', choice('file', 'file', (group) => group.file_name))}
      ${select('destination', 'Destination', state.destinations.map(({ name }) => html`<option value=${name}>${name}</option>`))}
      ${select('reason', 'Reason', REASONS.map((word) => html`<option value=${word}>${word}</option>`))}
      ${select('status', 'Status', choice('status', 'status'))}
      ${select('cause', 'Cause', CAUSES.map((word) => html`<option value=${word}>${word}</option>`))}
      ${select('newer_than', 'Given up within', AGES.map(([value, word]) => html`<option value=${value}>${word}</option>`))}
    </div>
    <div class="match" role="status"><span>${found ? html`<b>${isNone ? 'Nothing' : `${atLeast}${num(found.total)}`}</b> ${isAll ? '' : found.total > 1 ? 'match: ' : 'matches: '}${words(filter, fileName)}` : 'Counting…'}</span>
      <button class="btn" disabled=${isAll} onClick=${() => { location.hash = to('dead'); }}>Clear</button>
      <button class="btn pri" data-key="R" disabled=${!found || isNone || !operable()} title=${why() ?? 'key R'} onClick=${() => redrive(filter, words(filter, fileName), found, again)}><${Icon} name="retry" />Redrive ${found && !isNone ? `all ${atLeast}${num(found.total)}…` : '…'}</button></div>
    <${Trouble} error=${groups.error} again=${groups.again} />
  </section>
  ${found && !isNone && html`<${Section} title="Groups" note=${found.groups.length === 200 ? 'the 200 largest; the filter narrows them' : num(found.groups.length)}><${GroupTable} groups=${found.groups} total=${found.total} link=${(group) => to('dead', null, { ...filter, file: group.file, destination: group.destination, reason: group.reason, status: group.status, cause: group.cause })} /><//>
  <${Section} title="Messages"><${Trouble} error=${letters.error} />
    ${letters.items.length === 0 ? letters.isLoading && html`<${Loading} />` : html`<${Table} caption="Dead letters" cls="t-letters" columns=${LETTERS} rows=${found.total + 1}>${letters.items.map((letter) => html`<${Letter} letter=${letter} key=${`${letter.id} ${letter.destination}`} />`)}<//>`}
    <div class="foot"><span>Showing ${num(letters.items.length)} of ${atLeast}${num(found.total)}. “Redrive all” acts on all ${num(found.total)}, not on these ${num(letters.items.length)}.</span>
      ${letters.next && html`<button class="btn sm r" disabled=${letters.isLoading} onClick=${letters.more}>Show ${PAGE} more</button>`}</div><//>`}
  ${isNone && !isAll && html`<p class="none">Nothing matches. <a href=${to('dead')}>Clear the filter</a>.</p>`}`;
}
