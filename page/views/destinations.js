// Destinations: the ceiling of each, what it bears, and what can be set.
import { part } from '../lib/api.js';
import { Charts, Errors, InFlight, Latency, Throughput } from '../lib/charts.js';
import { clock, count, duration, ms, num, plain, rate, seconds } from '../lib/format.js';
import { html, useEffect } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { loadSeries, now, useAsk, useLive } from '../lib/store.js';
import { Cell, Foreign, Icon, Loading, None, Row, Section, State, Table, Trouble, Why } from '../lib/ui.js';
import { concurrency, operable, pause, rate as setRate, resume, why } from '../lib/verbs.js';
import { AuditTable } from './audit.js';
import { FileTable } from './files.js';

const COLUMNS = [['Destination'], ['Ceiling that binds now'], ['Rate', 'num'], ['In flight / limit', 'num'], ['Breaker'], ['p95', 'num opt'], ['Failed', 'num opt'], ['Backlog', 'num']];
const failed = (percent) => (percent == null ? '–' : `${percent < 10 ? percent.toFixed(1) : Math.round(percent)} %`);
const isStopped = (it) => it.state !== 'enabled';

// Why nothing goes, if so; else the ceiling.
export function Binding({ it }) {
  if (isStopped(it)) return html`<span class="why" title=${plain(it.reason)}>${it.state}${it.reason ? `: ${plain(it.reason)}` : ''}</span>${it.since && html` <span class="dim small">since ${clock(it.since, now())}</span>`}`;
  if (it.ceiling) return html`<${Why} ceiling=${it.ceiling} />${it.ceiling.since && html` <span class="dim small">since ${clock(it.ceiling.since, now())}</span>`}`;
  if (it.breaker === 'open') return html`<span class="why">breaker open</span>${it.not_before && html` <span class="dim small">next probe ${clock(it.not_before, now())}</span>`}`;
  return html`<span class="dim">${it.open ? 'no ceiling known' : 'nothing to send'}</span>`;
}

export const DestinationTable = ({ destinations }) => (destinations.length === 0 ? html`<${None}>No destination is configured.<//>` : html`<${Table} caption="Destinations" cls="t-dest" columns=${COLUMNS} rows=${destinations.length + 1}>
  ${destinations.map((it) => html`<${Row} key=${it.name}>
    <${Cell} cls="what"><a class="name" href=${to('destinations', it.name)}>${plain(it.name)}</a><//>
    <${Cell} cls="bind"><${Binding} it=${it} /><//>
    <${Cell} cls="num" label="Rate">${rate(it.sent_per_s)}<//>
    <${Cell} cls="num" label="In flight / limit">${num(it.in_flight)} / ${num(it.limit)}<//>
    <${Cell} label="Breaker">${it.breaker ? html`<${State} is=${it.breaker} />` : html`<span class="dim">–</span>`}<//>
    <${Cell} cls="num opt" label="p95">${ms(it.p95_ms)}<//>
    <${Cell} cls="num opt" label="Failed">${failed(it.failed_percent)}<//>
    <${Cell} cls="num" label="Backlog">${num(it.open)}<//>
  <//>`)}<//>`);

export function Destinations() {
  const { destinations, overview } = useLive();
  const down = destinations.filter((it) => isStopped(it) || it.breaker === 'open').length;
  return html`<section aria-label="Destinations"><div class="hd"><div><h1>${destinations.length ? (down ? `${count(down, 'destination')} of ${destinations.length} ${down === 1 ? 'stands' : 'stand'} still.` : destinations.length === 1 ? 'The destination takes messages.' : `All ${destinations.length} destinations take messages.`) : 'Destinations'}</h1></div></div></section>
    ${overview ? html`<section aria-label="All destinations"><${DestinationTable} destinations=${destinations} /></section>` : html`<${Loading} />`}`;
}

const Fact = ({ name, children, small }) => html`<div><dt>${name}</dt><dd>${children}${small && html` <small>${small}</small>`}</dd></div>`;

function title(it) {
  if (it.state === 'disabled' || it.state === 'paused') return 'is paused';
  if (it.state === 'blocked') return 'is blocked';
  if (it.state === 'not configured') return 'isn’t configured any more';
  if (it.breaker === 'open') return 'is down';
  if (it.breaker === 'half-open') return 'is being probed';
  if (!it.open) return 'has nothing to send';
  return it.sent_per_s > 0 ? 'is sending' : 'sends nothing';
}

export function Destination({ name }) {
  const live = useLive();
  const { data, error, again } = useAsk(`/destinations/${part(name)}`, 5_000);
  useEffect(() => { loadSeries(name).catch(() => {}); }, [name, live.contact]);
  const it = live.destinations.find((other) => other.name === name) ?? data;
  if (!it) return html`<section aria-label="Destination"><h1>${error ? 'This destination can’t be shown.' : ' '}</h1>${error ? html`<${Trouble} error=${error} again=${again} />` : html`<${Loading} />`}</section>`;
  const locked = { disabled: !operable(), title: why() };
  const isPaused = it.state === 'disabled';
  return html`<nav class="tabs" aria-label="Destinations">${live.destinations.map((other) => html`<a href=${to('destinations', other.name)} key=${other.name} aria-current=${other.name === name ? 'page' : undefined}><${Icon} name=${isStopped(other) ? 'pause' : { open: 'open', 'half-open': 'half' }[other.breaker] ?? 'closed'} tone=${isStopped(other) ? 'retry' : { open: 'dead', 'half-open': 'retry' }[other.breaker] ?? ''} />${plain(other.name)}</a>`)}</nav>
    <section aria-label="Destination">
    <div class="hd"><div><h1>${plain(it.name)} ${title(it)}</h1><p class="meta"><span class="mono">${plain(it.url ?? it.kind)}</span><span>${it.kind}</span></p></div>
      <div class="acts">${it.kind === 'webhook' && html`<button class="btn" ...${locked} onClick=${() => setRate(it)}>Set rate…</button><button class="btn" ...${locked} onClick=${() => concurrency(it)}>Set concurrency…</button>`}
        <button class="btn" data-key="p" ...${locked} onClick=${() => (isPaused ? resume(it) : pause(it))}><${Icon} name=${isPaused ? 'go' : 'pause'} />${isPaused ? 'Resume…' : 'Pause…'}</button></div></div>
    <p class="because flat">Ceiling: <${Binding} it=${it} />. ${it.out_since && `Out for ${duration(seconds(it.out_since, now()))}. `}${it.last_error && html`Last error ${clock(it.last_error.at, now())}: <b>${it.last_error.status ?? plain(it.last_error.reason)}</b>${it.last_error.text && html` <q><${Foreign} text=${it.last_error.text} /></q>`}. `}${it.holds.length > 0 ? `Because of its backlog, ${it.holds.join(', ')} ${it.holds.length === 1 ? 'waits' : 'wait'}. ` : ''}</p>
    <dl class="facts">
      <${Fact} name="Rate" small=${it.rate_per_s ? `of ${num(it.rate_per_s)}${it.rate_set ? ', set' : ''}` : 'no limit'}>${rate(it.sent_per_s)}<//>
      <${Fact} name="In flight" small=${`of ${num(it.limit)}`}>${num(it.in_flight)}<//>
      <${Fact} name="Concurrency" small=${it.concurrency_set ? 'set' : 'as configured'}>${it.concurrency ?? '–'}<//>
      <${Fact} name="Breaker">${it.breaker ? html`<${State} is=${it.breaker} />` : '–'}<//>
      <${Fact} name="p50 / p95">${ms(it.p50_ms)} / ${ms(it.p95_ms)}<//>
      <${Fact} name="Failed" small="in 10 s">${failed(it.failed_percent)}<//>
      <${Fact} name="Retry budget" small="tokens">${num(it.retry_tokens)}<//>
      <${Fact} name="Backlog" small=${`${num(it.counts.retrying)} retrying`}>${num(it.open)}<//>
    </dl>
    ${it.ceiling?.remedy && html`<div class="advise"><${Icon} name="tip" /><div>${plain(it.ceiling.remedy)}</div></div>`}</section>
    <${Section} title="Last 15 minutes"><${Charts} destination=${name} kinds=${[Throughput, InFlight, Latency, Errors]} /><//>
    <${Section} title="Messages" note="over all files"><dl class="facts">${['sent', 'retrying', 'pending', 'dead', 'unsent', 'cancelled'].map((key) => html`<${Fact} name=${key}>${key === 'dead' && it.counts.dead > 0 ? html`<a href=${to('dead', null, { destination: name })}>${num(it.counts.dead)}</a>` : num(it.counts[key])}<//>`)}
      <${Fact} name="batches out" small=${it.batches.damaged ? `${it.batches.damaged} damaged` : ''}>${num(it.batches.leased)}<//><${Fact} name="next due">${clock(it.next_due, now())}<//></dl><//>
    ${data && html`<${Section} title="Files on their way to it" note=${data.files.length === 50 ? 'the first 50' : num(data.files.length)} aside=${html`<a href=${to('files', null, { state: 'open' })}>All in flight</a>`}>${data.files.length ? html`<${FileTable} caption="Files to this destination" files=${data.files.map((file) => live.files.get(file.id) ?? file)} />` : html`<${None}>None.<//>`}<//>
    <${Section} title="Audit" note=${data.audit.length === 50 ? 'the 50 latest' : num(data.audit.length)} aside=${html`<a href=${to('audit', null, { of: name })}>All about ${plain(name)}</a>`}>${data.audit.length ? html`<${AuditTable} lines=${data.audit} />` : html`<${None}>Nobody has ordered anything of it.<//>`}<//>`}`;
}
