// Pipeline: every actor as a live drawing of the way of a batch, and the same as a table.
import { clock, count, num, plain, rate } from '../lib/format.js';
import { html } from '../vendor/preact.js';
import { to } from '../lib/route.js';
import { now, useAsk, useLive } from '../lib/store.js';
import { Because, Cell, Icon, Loading, Row, Section, State, Table, Trouble } from '../lib/ui.js';

// The stages in the order of the way, by the names of actors; what isn't here stands beside the way.
const WAY = [
  ['watch', ['file_watcher', 'queue_feed']],
  ['parse', ['parser']],
  ['batch', ['batcher']],
  ['outbox'],
  ['carry', ['coordinator', 'dispatcher', 'throttle']],
  ['deliver', ['webhook_delivery', 'table_delivery']],
  ['world'],
];
const BACK = ['receipt_collector', 'receipt_reconciler'];
const DESTINATIONS = 4;
const words = (name) => name.replace(/[-_]/g, ' ');
const key = (name) => name.replace(/-/g, '_');
const sumOf = (list, field) => (list.every((actor) => actor[field] == null) ? null : list.reduce((sum, actor) => sum + (actor[field] ?? 0), 0));

function Meter({ name, value, all, text }) {
  return html`<span class="l">${name} <em>${text}</em></span><u aria-hidden="true">${value != null && all > 0 && html`<i style=${{ width: `${Math.min(100, (value / all) * 100)}%` }}></i>`}</u>`;
}

// All actors of one name.
function Stage({ name, actors }) {
  const dead = actors.filter((actor) => !actor.alive).length;
  const of = [...new Set(actors.map((actor) => actor.of).filter(Boolean))];
  const [mailbox, room] = [sumOf(actors, 'mailbox'), sumOf(actors, 'mailbox_max')];
  const busy = sumOf(actors, 'busy_percent');
  const restarts = sumOf(actors, 'restarts');
  return html`<div class=${`nd ${dead ? 'down' : ''}`}>
    <b>${words(name)}${actors.length > 1 ? html` <small>×${actors.length}</small>` : ''}</b>
    <span class="of dim" title=${plain(of.join(', '))}>${of.length > 2 ? `${plain(of.slice(0, 2).join(', '))} +${of.length - 2}` : plain(of.join(', ')) || ' '}</span>
    <${Meter} name="mailbox" value=${mailbox} all=${room} text=${mailbox == null ? '–' : `${num(mailbox)}${room == null ? '' : ` / ${num(room)}`}`} />
    <${Meter} name="busy" value=${busy} all=${actors.length * 100} text=${busy == null ? '–' : `${num(busy / actors.length)} %`} />
    <span class="dim">gen ${Math.max(...actors.map((actor) => actor.generation))}, ${count(restarts, 'restart')}</span>
    ${dead > 0 && html`<span class="c-dead">${dead === actors.length ? 'down' : `${dead} down`}</span>`}
  </div>`;
}

function World({ live }) {
  const most = [...live.destinations].sort((a, b) => b.open - a.open || (a.name < b.name ? -1 : 1)).slice(0, DESTINATIONS);
  const hot = live.overview.ceiling && live.overview.ceiling_of;
  return html`${most.map((it) => {
    const isDown = it.state !== 'enabled' || it.breaker === 'open';
    return html`<a key=${it.name} class=${`nd ext ${isDown ? 'down' : it.name === hot ? 'hot' : ''}`} href=${to('destinations', it.name)}>
      ${(isDown || it.name === hot) && html`<span class="tag"><${Icon} name=${isDown ? 'stop' : 'warn'} />${isDown ? 'stopped' : 'limits now'}</span>`}
      <b>${plain(it.name)}</b><strong>${rate(it.sent_per_s)}</strong><span class="of mono" title=${plain(it.ceiling?.text ?? it.reason)}>${plain(isDown && it.reason ? it.reason : it.ceiling?.text ?? (it.open ? '' : 'nothing to send'))}</span><span class="dim">${num(it.in_flight)} of ${num(it.limit)} in flight</span></a>`;
  })}${live.destinations.length > DESTINATIONS && html`<a class="lk" href=${to('destinations')}>and ${live.destinations.length - DESTINATIONS} more</a>`}`;
}

const COLUMNS = [['Actor'], ['Of'], ['State'], ['Mailbox', 'num'], ['Busy', 'num'], ['Generation', 'num'], ['Restarts', 'num'], ['Last exit']];
const ActorRow = ({ actor }) => html`<${Row}><${Cell} cls="what" title=${plain(actor.path)}><b class="name">${words(actor.name)}${actor.number ? ` ${actor.number + 1}` : ''}</b><//><${Cell} label="Of">${plain(actor.of ?? '')}<//>
  <${Cell}><${State} is=${actor.alive ? 'enabled' : 'failed'} word=${actor.alive ? 'alive' : 'down'} /><//>
  <${Cell} cls="num" label="Mailbox">${actor.mailbox == null ? '–' : `${num(actor.mailbox)}${actor.mailbox_max == null ? '' : ` / ${num(actor.mailbox_max)}`}`}<//>
  <${Cell} cls="num" label="Busy">${actor.busy_percent == null ? '–' : `${num(actor.busy_percent)} %`}<//><${Cell} cls="num" label="Generation">${actor.generation}<//><${Cell} cls="num" label="Restarts">${actor.restarts}<//>
  <${Cell} cls="rest">${actor.last_exit ? html`${clock(actor.last_exit.at, now())}: ${plain(actor.last_exit.text)}` : html`<span class="dim">none since ${clock(actor.since, now())}</span>`}<//><//>`;

export function Pipeline() {
  const live = useLive();
  const { data, error, again } = useAsk('/actors', 2_000);
  const { overview } = live;
  if (!data || !overview) return html`<section aria-label="Pipeline"><h1>Pipeline</h1>${error ? html`<${Trouble} error=${error} again=${again} />` : html`<${Loading} />`}</section>`;
  const byName = new Map();
  for (const actor of data.items) byName.set(key(actor.name), [...(byName.get(key(actor.name)) ?? []), actor]);
  const stage = (name) => byName.has(name) && html`<${Stage} key=${name} name=${name} actors=${byName.get(name)} />`;
  const onWay = new Set([...WAY.flatMap(([, names]) => names ?? []), ...BACK]);
  const beside = [...byName.keys()].filter((name) => !onWay.has(name));
  const isMoving = overview.sent_per_s > 0;
  const isReading = overview.files.reading > 0;
  const restarts = data.items.reduce((sum, actor) => sum + actor.restarts, 0);
  const dead = data.items.filter((actor) => !actor.alive).length;
  const batches = live.destinations.reduce((sum, it) => sum + it.batches.outstanding, 0);
  const retrying = live.destinations.reduce((sum, it) => sum + it.counts.retrying, 0);
  const title = data.stuck.length ? `Stuck: ${plain(data.stuck.join(', '))}.` : dead ? `${count(dead, 'actor is', 'actors are')} down.` : isMoving ? (overview.ceiling ? html`${plain(overview.ceiling_of ?? 'Something')} is the limit.` : 'Messages move.') : overview.open ? 'Nothing moves.' : 'Every part is idle.';
  const column = (index) => {
    const [id, names] = WAY[index];
    if (id === 'outbox') return html`<div class="nd store"><b>outbox</b><strong>${num(overview.open)}</strong><span>messages open</span><span class="dim">${num(batches)} batches not due</span><span class="dim">${live.overview.daemon.profile === 'aws' ? 'DynamoDB' : 'SQLite'}</span></div>`;
    if (id === 'world') return html`<${World} live=${live} />`;
    return names.map(stage);
  };
  const edge = (index) => (index < 3 ? isReading : isMoving);
  return html`<section aria-label="Pipeline"><h1>${title}</h1>
    <p class="because flat">${overview.ceiling ? html`<${Because} ceiling=${overview.ceiling} of=${overview.ceiling_of} />` : `${num(overview.open)} messages open, ${rate(overview.sent_per_s)}.`}</p></section>
    <${Trouble} error=${error} again=${again} />
    <div class="pipe" role="group" aria-label="The way of a batch; the same as a table below">
      <div class="loop"><span>retry: the same batch, due again. ${retrying ? `${count(retrying, 'message waits', 'messages wait')}` : 'None waits'}</span></div>
      ${WAY.map(([id], index) => html`${index > 0 && html`<div class=${`edge ${edge(index - 1) ? 'go' : ''}`} style=${{ gridColumn: index * 2 }} key=${`e${id}`} aria-hidden="true"></div>`}<div class="col" style=${{ gridColumn: index * 2 + 1 }} key=${id}>${column(index)}</div>`)}
      ${BACK.some((name) => byName.has(name)) && html`<div class="back"><span class="dim">receipts</span>${BACK.map((name) => stage(name))}<span class="dim">joined with the rows</span></div>`}
      ${beside.length > 0 && html`<div class="beside"><span class="dim">beside the way</span>${beside.map(stage)}</div>`}
    </div>
    <ul class="lg"><li class="c-sent"><s class="d"></s><em>messages move</em></li><li class="c-dim"><s></s><em>idle</em></li><li class="c-retry"><s class="d"></s><em>retries</em></li><li>Bars: mailbox, how full; busy, share of the time. A dash: it takes no messages, or isn’t measured yet.</li></ul>
    <${Section} title="Actors" note=${`${num(data.items.length)}, ${count(restarts, 'restart')} since the process began`}>
      <${Table} caption="Actors" cls="t-actors" columns=${COLUMNS} rows=${data.items.length + 1}>${data.items.map((actor) => html`<${ActorRow} actor=${actor} key=${`${actor.path} ${actor.name} ${actor.of} ${actor.number}`} />`)}<//><//>`;
}
