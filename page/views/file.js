// One file: what became of its rows, and what can be ordered.
import { part } from '../lib/api.js';
import { by, bytes, clock, count, duration, minute, num, plain, rate, seconds, share } from '../lib/format.js';
import { usePages } from '../lib/list.js';
import { html } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now, useAsk, useLive } from '../lib/store.js';
import { Because, Cell, Cut, Foreign, Icon, Loading, Quoted, Row, Section, Table, Trouble, signOf, toneOf } from '../lib/ui.js';
import { cancel, hold, operable, priority, release, why } from '../lib/verbs.js';
import { GroupTable } from './dead.js';
import { Binding } from './destinations.js';

const MESSAGES = ['sent', 'retrying', 'pending', 'dead', 'unsent', 'cancelled'];
const ROWS = ['rejected', 'duplicates'];
const ALWAYS = ['sent', 'retrying', 'pending', 'dead'];

// Every part of it to scale, and below what is too small to be seen there.
function Balance({ file }) {
  const several = file.to.length > 1;
  const keys = several ? MESSAGES : [...MESSAGES, ...ROWS];
  const parts = keys.map((key) => [key, file[key]]).filter(([key, n]) => n > 0 || ALWAYS.includes(key) || (ROWS.includes(key) && !several));
  const all = parts.reduce((sum, [, n]) => sum + n, 0);
  const seen = parts.filter(([, n]) => n > 0);
  const small = seen.filter(([, n]) => n / all < 0.03);
  const fewest = small.reduce((sum, [, n]) => sum + n, 0);
  const bar = (list, whole, label) => html`<div class="stack" role="img" aria-label=${`${label}: ${list.map(([key, n]) => `${key} ${num(n)}`).join(', ')}`}>${list.map(([key, n]) => html`<i key=${key} class=${`k-${key}`} style=${{ flexGrow: n / whole }}></i>`)}</div>`;
  const line = ([key, n]) => html`<tr key=${key}><th scope="row"><${Icon} name=${signOf(key)} tone=${toneOf(key)} />${key}</th><td class="num">${num(n)}</td><td class="num dim">${share(n, all)}</td></tr>`;
  return html`<div class="bal"><div>
      ${all > 0 ? bar(seen, all, 'To scale') : html`<div class="stack"></div>`}<div class="scale"><span>0</span><span>${num(all)} ${several ? 'messages' : 'rows'}</span></div>
      ${(small.length > 0 || !file.settled_at) && html`<div class="lens">${small.length > 0 && seen.length > small.length && html`<p class="small">The ${num(fewest)} that are too few to be seen above:</p>${bar(small, fewest, 'Enlarged')}<ul class="lg">${small.map(([key, n]) => html`<li key=${key}><${Icon} name=${signOf(key)} tone=${toneOf(key)} />${key} ${num(n)}</li>`)}</ul>`}</div>`}
    </div>
    <table class="ledger"><caption class="vh">What became of the ${several ? 'messages' : 'rows'}</caption>
      <tbody>${parts.map(line)}<tr class="sum"><th scope="row">${several ? `messages to ${file.to.length} destinations` : file.rows_final ? 'rows' : 'rows so far'}</th><td class="num">${num(all)}</td><td class="num">${file.rows_final ? '' : 'reading'}</td></tr>
      ${several && ROWS.map((key) => line([key, file[key]]))}${several && html`<tr><th scope="row">rows${file.rows_final ? '' : ' so far'}</th><td class="num">${num(file.rows)}</td><td></td></tr>`}
      <tr class="ver"><td colspan="3"><${Icon} name=${file.balanced ? 'ok' : 'alarm'} tone=${file.balanced ? 'ok' : 'dead'} /> ${file.balanced ? (file.complete ? 'Balanced: every row has ended.' : 'Balanced so far: every row is accounted for.') : 'NOT balanced: the parts don’t add up to the rows. Keep the state directory and report it.'}</td></tr></tbody></table></div>`;
}

function Steps({ file }) {
  const step = (isDone, sign, title, at, words) => html`<li class=${isDone ? '' : 'todo'}><${Icon} name=${isDone ? sign : 'pending'} tone=${isDone ? (sign === 'dead' ? 'dead' : 'sent') : ''} /><b>${title}</b><span class="mono">${at}</span><p>${words}</p></li>`;
  const read = Boolean(file.closed_at);
  return html`<ol class="tl">
    ${step(true, 'sent', 'Claimed', clock(file.claimed_at, now()), bytes(file.bytes))}
    ${step(read, file.ingest === 'failed' || file.ingest === 'source-lost' ? 'dead' : 'sent', file.ingest === 'source-lost' ? 'Source lost' : file.ingest === 'failed' ? 'Failed' : 'Read to the end', clock(file.closed_at, now()), `${num(file.rows)} rows${read ? `, in ${duration(seconds(file.claimed_at, file.closed_at))}` : ' so far'}`)}
    ${step(Boolean(file.settled_at), 'sent', 'Settled', file.settled_at ? clock(file.settled_at, now()) : file.done_at ? `expected ${by(file.done_at, now())}` : '–', file.settled_at ? `after ${duration(file.took_s)}` : `${num(file.open)} open`)}
    ${file.finish_by && html`<li class=${now() > Date.parse(file.finish_by) ? '' : 'todo'}><${Icon} name="clock" tone=${file.in_time === false ? 'dead' : ''} /><b>Due</b><span class="mono">${minute(file.finish_by, now())}</span><p>${file.in_time === false ? 'It will be late.' : file.in_time ? 'It will be in time.' : ''}</p></li>`}
  </ol>`;
}

const TO = [['Destination'], ['Sent', 'num'], ['Retrying', 'num'], ['Pending', 'num'], ['Dead', 'num'], ['What binds']];
const ByDestination = ({ to: places, all }) => html`<${Section} title="By destination"><${Table} caption="By destination" cls="t-to" columns=${TO} rows=${Object.keys(places).length + 1}>
  ${Object.entries(places).map(([name, at]) => html`<${Row} key=${name}><${Cell} cls="what"><a class="name" href=${to('destinations', name)}>${plain(name)}</a><//>
    ${TO.slice(1, 5).map(([title]) => html`<${Cell} cls="num" label=${title}>${num(at[title.toLowerCase()])}<//>`)}
    <${Cell} cls="rest">${at.held ? html`<span class="why">${at.held.cause}: ${plain(at.held.reason)}</span> <span class="dim">since ${clock(at.held.since, now())}</span>` : at.closed_until ? html`<span class="why">closed until ${clock(at.closed_until, now())}</span>` : at.retrying + at.pending > 0 ? all.filter((it) => it.name === name).map((it) => html`<${Binding} it=${it} />`) : html`<span class="dim">nothing is left to send</span>`}<//><//>`)}<//><//>`;

const REJECTED = [['Line', 'num'], ['Row', 'num'], ['Reason'], ['How it begins']];
function Rejected({ file }) {
  // Asked for anew when the file is read to its end; what it says before is of the rows that were read.
  const { items, total, next, isLoading, error, again, more } = usePages(`/files/${part(file.id)}/rejects`, {}, file.rows_final);
  return html`<${Section} title="Rejected rows" note=${num(file.rejected)}><${Trouble} error=${error} again=${again} />
    ${items.length ? html`<${Table} caption="Rejected rows" cls="t-rejected" columns=${REJECTED} rows=${total + 1}>${items.map((it) => html`<${Row} key=${it.row}>
      <${Cell} cls="num" label="Line">${num(it.line)}<//><${Cell} cls="num" label="Row">${num(it.row)}<//><${Cell} cls="rest"><${Foreign} text=${it.reason} /><//><${Cell} cls="rest">${operable() ? html`<${Quoted} text=${it.text} isWhole=${it.is_whole} />` : html`<span class="dim">for operators</span>`}<//><//>`)}<//>
      <${Cut} shown=${items.length} total=${total} what="rejected rows">${next && html`<button class="btn sm r" disabled=${isLoading} onClick=${more}>Show more</button>`}<//>` : isLoading && html`<${Loading} />`}<//>`;
}

const TITLE = { reading: 'is being read', sending: 'is being sent', held: 'is held', waiting: 'waits for its time', done: 'is done', failed: 'failed' };

export function File({ id }) {
  const live = useLive();
  const { data, error, again } = useAsk(`/files/${part(id)}`, 2_000);
  if (!data) return html`<section aria-label="File"><p class="crumb"><a href=${to('files')}>Files</a></p><h1>${error ? 'This file can’t be shown.' : ' '}</h1>${error ? html`<${Trouble} error=${error} again=${again} />` : html`<${Loading} />`}</section>`;
  // What events say is newer than what was asked for, unless the answer is.
  const event = live.files.get(data.id);
  const file = event && data.state !== 'done' ? { ...data, ...event } : data;
  const isOver = file.state === 'done' || file.state === 'failed' || (file.open === 0 && file.rows_final);
  const isHeld = file.state === 'held' || Object.values(data.destinations).some((at) => at.held && at.held.cause !== 'cancelled');
  const locked = { disabled: !operable(), title: why() };
  const act = (verb) => () => { verb(file); };
  return html`<section aria-label="File">
    <div class="hd"><div><p class="crumb"><a href=${to('files')}>Files</a> / ${plain(file.feed)}</p><h1><${Foreign} text=${file.name} /> ${TITLE[file.state]}</h1>
      <p class="meta"><span>to ${file.to.map((name, i) => html`${i ? ', ' : ''}<a href=${to('destinations', name)}>${plain(name)}</a>`)}</span><span>${file.priority}</span><span class="mono" title=${file.id}>id ${file.id?.slice(0, 12)}…</span><span class="mono" title=${file.sha256}>sha256 ${file.sha256?.slice(0, 12)}…</span></p></div>
      ${!isOver && html`<div class="acts">
        <label class="pick"><span class="vh">Priority</span><select value=${file.priority} ...${locked} onChange=${(change) => { const { value } = change.target; change.target.value = file.priority; priority(file, value); }}>${['urgent', 'normal', 'bulk'].map((word) => html`<option value=${word}>${word}</option>`)}</select></label>
        <button class="btn bad" ...${locked} onClick=${act(cancel)}>Cancel…</button>
        <button class="btn" data-key="h" ...${locked} onClick=${act(isHeld ? release : hold)}><${Icon} name=${isHeld ? 'go' : 'pause'} />${isHeld ? 'Release…' : 'Hold…'}</button></div>`}</div>
    ${(!isOver || file.reason) && html`<p class="because flat">${file.reason ? html`<span class="why">${plain(file.reason)}</span>${file.since && ` since ${clock(file.since, now())}`}. ` : ''}${file.ceiling && !file.reason && html`<${Because} ceiling=${file.ceiling} />`}
      ${isOver ? '' : file.done_at ? `${rate(file.sent_per_s)}, ${duration(file.left_s)} left: done by ${by(file.done_at, now())}.` : file.latest ? `It must go on by ${minute(file.latest, now())} to be done by ${minute(file.finish_by, now())}.` : `${count(file.open, 'message')} open.`}</p>`}
    </section>
    <${Section} title="Balance" note=${file.rows_final ? `${num(file.rows)} rows` : `${num(file.rows)} rows so far`}><${Balance} file=${file} /><//>
    <${Section} title="Way"><${Steps} file=${file} /><//>
    <${ByDestination} to=${data.destinations} all=${live.destinations} />
    ${file.rejected > 0 && html`<${Rejected} file=${file} />`}
    ${data.dead_groups.length > 0 && html`<${Section} title="Dead letters" note=${num(file.dead)} aside=${html`<a href=${to('dead', null, { file: file.id })}>See and redrive</a>`}><${GroupTable} groups=${data.dead_groups} total=${file.dead} link=${(group) => to('dead', null, { file: group.file, destination: group.destination, reason: group.reason, status: group.status })} /><//>`}
    ${data.receipts && html`<${Section} title="Receipts">${data.receipts.length ? html`<ul class="events">${data.receipts.map((line) => html`<li><${Icon} name=${signOf(line.state)} tone=${toneOf(line.state)} /><span>${line.state}</span><span class="t">${num(line.messages)}</span><p>from ${plain(line.destination)}</p></li>`)}</ul>` : html`<p class="none">None yet.</p>`}<//>`}`;
}
